"""How to train: the settings, and the optimizer and the schedule that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from tncompress.layers import TNConv
from tncompress.spec import explain

LR = {"sgd": 0.02, "adamw": 1e-3}
"""The learning rate where none is given."""
KEEPING = frozenset({"checkpoint_every", "checkpoint_seconds"})
"""Settings that do not change what is learned: a run goes on from checkpoints written with others."""


class FinetuneConfig(BaseModel):
    """How to train. ``local_epochs`` of slice-wise distillation come first, then ``epochs`` of the whole.

    **The whole**: SGD with Nesterov momentum, or AdamW; a linear warm-up, then a cosine to 0, or one cycle.
    The loss is cross-entropy, plus ``distill`` times the KL divergence to the teacher's softened outputs
    (Hinton et al. 2015), plus ``features`` times the squared distance to the teacher's outputs of the
    layers ``feature_layers`` (names or patterns; the compressed ones by default), relative to their own
    squares, where there is a teacher. Weight decay leaves factors, biases and BatchNorm alone: on factors
    it would penalise a gauge, not the kernel. ``frobenius_decay`` decays the kernel that factors stand
    for: their gradient of half its squared norm, as weight decay does to a dense one. Factors have a
    learning rate of their own, ``lr_factors``, where one is given. ``balance`` splits the singular values
    of each bond evenly over its two sides before the first step, ``rebalance_every`` after every so many;
    the momentum of the factors is then begun anew. With ``ema`` the result is a moving average of the
    weights.

    **Slices** are ``layer`` (each compressed layer), ``block`` (the smallest module around each that holds
    several) or names and patterns; their factors learn by Adam to give the teacher's outputs from its
    inputs.

    ``accumulate`` batches make one step. ``mixed_precision`` ``auto`` is bf16 on CUDA devices that have
    it, and off elsewhere. ``channels_last`` has images and kernels in that order in memory while they are
    trained, which is often faster. A run ends early at ``target_recovery`` of the accuracy lost.
    Checkpoints are written at the end of each epoch, and in between after ``checkpoint_every`` steps or
    ``checkpoint_seconds``.

    Wherever a config is wanted a mapping with these keys will do. An unknown key and a value out of bounds
    are a ``ValueError``.

    >>> FinetuneConfig(optimizer="adamw", epochs=5).lr, FinetuneConfig.parse({"epochs": 5}).lr
    (0.001, 0.02)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(3, ge=0)
    lr: float = Field(LR["sgd"], gt=0)
    lr_factors: float | None = Field(None, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    frobenius_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    distill: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    features: float = Field(0.0, ge=0)
    feature_layers: tuple[str, ...] = ()
    clip_norm: float | None = Field(5.0, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    balance: bool = False
    rebalance_every: int | None = Field(None, ge=1)
    local_epochs: int = Field(0, ge=0)
    local_lr: float = Field(1e-3, gt=0)
    slices: Literal["layer", "block"] | tuple[str, ...] = "layer"
    accumulate: int = Field(1, ge=1)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    channels_last: bool = False
    target_recovery: float | None = Field(None, gt=0)
    checkpoint_every: int | None = Field(None, ge=1)
    checkpoint_seconds: float = Field(60.0, gt=0)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _lr_of_the_optimizer(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("optimizer") in LR:
            return {"lr": LR[given["optimizer"]], **given}
        return given

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _unquoted(cls, given: Any) -> Any:
        return "no" if given is False else given  # what YAML makes of an unquoted no

    @model_validator(mode="after")
    def _something_to_do(self) -> FinetuneConfig:
        if self.epochs + self.local_epochs < 1:
            raise ValueError(
                f"wanted at least 1 of epochs and local_epochs, got {self.epochs}, {self.local_epochs}"
            )
        return self

    @classmethod
    def parse(cls, value: FinetuneConfig | Mapping[str, Any] | None) -> FinetuneConfig:
        """Return the config that ``value`` is or describes; None is the default."""
        if isinstance(value, FinetuneConfig):
            return value
        try:
            return cls.model_validate(dict(value or {}))
        except ValidationError as error:
            raise ValueError(f"config: {explain(error, cls)}") from None


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in three groups: dense weights, which decay, factors, and others."""
    held = {id(f) for m in model.modules() if isinstance(m, TNConv) for f in m.factors}
    dense: list[nn.Parameter] = []
    factors: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = factors if id(parameter) in held else dense if parameter.ndim > 1 else others
            kind.append(parameter)
    return [
        {"params": dense, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": factors, "lr": config.lr_factors or config.lr, "weight_decay": 0.0},
        {"params": others, "lr": config.lr, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the whole; a model with nothing to train is a ``ValueError``."""
    groups = [group for group in parameter_groups(model, config) if group["params"]]
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient: nothing can be trained")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)


def make_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps: int) -> LRScheduler:
    """Return the schedule of the learning rates over ``steps`` steps of the optimizer."""
    if config.schedule == "one-cycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        rising = max(config.warmup, 1 / steps)  # of no steps at all, torch's schedule divides by zero
        return OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=min(rising, 0.99))
    return LambdaLR(optimizer, warmup_cosine(steps, config.warmup))


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Return the factor on the learning rate at each step: linear up to 1, then a cosine down to 0."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return factor
