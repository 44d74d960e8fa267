"""Signatures as a reader wants them: settings with their defaults, without what checks them."""

from pydantic import BaseModel


def _tidy(app, what, name, found, options, signature, returns):
    """Give a class of settings its fields and defaults as its signature."""
    if isinstance(found, type) and issubclass(found, BaseModel):
        return f"(*, {', '.join(_field(name, field) for name, field in found.model_fields.items())})", None
    return None


def _field(name, field) -> str:
    if field.is_required():
        return name
    default = field.get_default(call_default_factory=True)
    return (
        f"{name}={default!r}" if not isinstance(default, BaseModel) else f"{name}={type(default).__name__}()"
    )


def setup(sphinx):
    """Have autodoc ask here."""
    sphinx.connect("autodoc-process-signature", _tidy)
    return {"parallel_read_safe": True}
