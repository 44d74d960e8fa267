"""A spec round-trips through every file format, and whatever is no spec is one clear line."""

import json
import math
import re
import tomllib

import pytest
import torch
import yaml
from conftest import every_format
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import tncompress as tnc
from tncompress import (
    CP,
    EVBMF,
    MPS,
    SVD,
    Energy,
    FixedRank,
    ParamsRatio,
    RelError,
    Rule,
    Settings,
    Spec,
    Tucker,
)
from tncompress.policies import POLICIES, make_policy
from tncompress.spec import KEEP_DENSE, matches_any

pytestmark = pytest.mark.usefixtures("unchecked")  # wrong types are met by errors of our own here

FULL = {
    "version": 1,
    "default": {"format": "mps", "rank": {"rel_error": 0.2}, "min_rank": 4, "round_to": 8},
    "rules": [
        {"pattern": "layer[34].*.conv2", "format": "tucker", "rank": {"fixed": [64, 64]}},
        {"pattern": "re:.*downsample.*", "keep_dense": True},
        {
            "pattern": "fc",
            "format": {"name": "svd", "cut": "in|rest"},
            "rank": {"energy": 0.9},
            "min_rank": 2,
        },
    ],
    "keep_dense": ["stem", "classifier", "layer1.*"],
    "allow_larger": True,
}
"""Every key there is, at every level."""

POLICY_VALUES = {
    "fixed": [1, 32, (8, 4), [3]],
    "rank_fraction": [0.25, 1, 1e-9],
    "params_ratio": [0.25, 1, 1e-9],
    "energy": [0.95, 1.0],
    "rel_error": [0.1, 1],
    "entropy": [1.0, 2, 0.3],
    "evbmf": [1, 0.8],
}


def toml_of(value) -> str:
    """A mapping of plain values as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return json.dumps(value)


WRITERS = {
    ".json": json.dumps,
    ".yaml": yaml.safe_dump,
    ".yml": yaml.safe_dump,
    ".toml": lambda value: "\n".join(f"{key} = {toml_of(item)}" for key, item in value.items()),
}
every_suffix = pytest.mark.parametrize("suffix", WRITERS)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert text.splitlines() == [text]
    return text


# --- round trips --------------------------------------------------------------------------------------------


def test_every_key_arrives():
    spec = Spec.parse(FULL)
    assert spec.default == Settings(format=MPS(), rank=RelError(0.2), min_rank=4, round_to=8)
    assert spec.keep_dense == ("stem", "classifier", "layer1.*")
    assert spec.allow_larger
    first, second, third = spec.rules
    assert (first.pattern, first.format, first.rank) == ("layer[34].*.conv2", Tucker(), FixedRank((64, 64)))
    assert second.keep_dense
    assert (third.format, third.rank, third.min_rank) == (SVD("in|rest"), Energy(0.9), 2)


@pytest.mark.parametrize("value", [{}, FULL, {"keep_dense": []}, {"default": {"format": "cp"}}], ids=str)
@every_suffix
def test_a_spec_survives_every_file(value, suffix, tmp_path):
    spec, path = Spec.parse(value), tmp_path / f"spec{suffix}"
    path.write_text(WRITERS[suffix](spec.to_dict()))
    assert Spec.parse(path) == Spec.parse(str(path)) == spec
    assert Spec.parse(path).to_dict() == spec.to_dict()
    assert Spec.parse(spec.to_dict()) == spec == Spec.parse(spec)
    assert Spec.parse(spec.to_dict()).model_dump() == spec.model_dump()


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_saved_spec_is_read_back(suffix, tmp_path):
    spec = Spec.parse(FULL)
    spec.save(tmp_path / f"spec{suffix}")
    assert Spec.parse(tmp_path / f"spec{suffix}") == spec


def test_toml_is_read_as_people_write_it(tmp_path):
    (tmp_path / "spec.toml").write_text(
        """
        keep_dense = ["stem"]
        [default]
        format = "tucker"
        rank.energy = 0.9
        [[rules]]
        pattern = "fc"
        keep_dense = true
        """
    )
    spec = Spec.parse(tmp_path / "spec.toml")
    assert (spec.default.format, spec.default.rank) == (Tucker(), Energy(0.9))
    assert spec.rules[0].keep_dense
    assert tomllib.loads((tmp_path / "spec.toml").read_text())["keep_dense"] == list(spec.keep_dense)


@pytest.mark.parametrize(
    ("tag", "value"), [(t, v) for t, values in POLICY_VALUES.items() for v in values], ids=str
)
@every_suffix
def test_every_policy_survives_every_file(tag, value, suffix, tmp_path):
    policy = POLICIES[tag](value)
    spec = Spec(default=Settings(rank=policy), rules=(Rule(pattern="a", rank=policy),))
    (tmp_path / f"spec{suffix}").write_text(WRITERS[suffix](spec.to_dict()))
    back = Spec.parse(tmp_path / f"spec{suffix}")
    assert back == spec
    assert back.default.rank == back.rules[0].rank == policy == make_policy({tag: value})


def test_all_policies_are_tried_here():
    assert set(POLICIES) == set(POLICY_VALUES)


@every_format
@every_suffix
def test_every_format_survives_every_file(format, suffix, tmp_path):
    spec = Spec(default=Settings(format=format))
    (tmp_path / f"spec{suffix}").write_text(WRITERS[suffix](spec.to_dict()))
    assert Spec.parse(tmp_path / f"spec{suffix}").default.format == format


def test_what_is_written_is_what_was_given():
    """A default that changes in a later version must not be frozen into files that never named it."""
    assert Spec().to_dict() == {"version": 1}
    assert Spec.parse({"default": {"format": "cp"}}).to_dict() == {"version": 1, "default": {"format": "cp"}}


def test_the_defaults_are_those_that_the_docs_name():
    spec = Spec()
    assert spec.keep_dense == KEEP_DENSE == ("stem", "classifier")
    assert (spec.default.format, spec.default.rank) == (MPS(), ParamsRatio(0.25))
    assert (spec.rules, spec.allow_larger) == ((), False)


def test_a_spec_is_frozen():
    spec = Spec.parse(FULL)
    for thing, name in ((spec, "allow_larger"), (spec.default, "rank"), (spec.rules[0], "pattern")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, None)
    with pytest.raises(AttributeError):
        spec.default.rank.error = 0.5


# --- rules --------------------------------------------------------------------------------------------------


def test_a_rule_takes_from_the_default_what_it_leaves_out():
    spec = Spec.parse(
        {
            "default": {"format": "cp", "rank": {"energy": 0.8}, "round_to": 8},
            "rules": [
                {"pattern": "a", "rank": {"fixed": 2}},
                {"pattern": "b", "format": "svd", "round_to": 1},
            ],
        }
    )
    a, b = spec.rules
    assert (a.format, a.rank, a.round_to) == (CP(), FixedRank(2), 8)
    assert (b.format, b.rank, b.round_to) == (SVD(), Energy(0.8), 1)


def test_the_first_rule_that_matches_wins_and_the_default_is_last():
    spec = Spec.parse({"rules": [{"pattern": "a.*"}, {"pattern": "a.b"}, {"pattern": "re:^c"}]})
    assert spec.rule_for(["a.b"]) is spec.rules[0]
    assert spec.rule_for(["x", "cc"]) is spec.rules[2]
    assert spec.rule_for(["b"]) is spec.default


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("conv1", "conv1", True),
        ("conv1", "layer.conv1", False),
        ("*.conv1", "layer.0.conv1", True),
        ("layer[34].*", "layer3.0", True),
        ("layer[34].*", "layer2.0", False),
        ("CONV1", "conv1", False),
        ("re:conv1", "layer.conv1", True),
        ("re:^conv1", "layer.conv1", False),
        ("re:(a|b)$", "x.b", True),
    ],
)
def test_patterns_are_shell_patterns_or_searched_expressions(pattern, name, matches):
    assert matches_any(pattern, ["other", name]) is matches


# --- misuse -------------------------------------------------------------------------------------------------

SETTINGS_KEYS = "format, rank, min_rank, max_rank, round_to"
TAGS = "the tags are fixed, rank_fraction, params_ratio, energy, rel_error"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"defualt": {}},
            "unknown key 'defualt'; the keys there are version, default, rules, keep_dense, include, "
            "allow_larger",
        ),
        ({"default": {"fromat": "mps"}}, f"unknown key 'default.fromat'; the keys there are {SETTINGS_KEYS}"),
        ({"default": {"pattern": "a"}}, f"unknown key 'default.pattern'; the keys there are {SETTINGS_KEYS}"),
        (
            {"rules": [{"pattern": "a", "rnak": 1}]},
            f"unknown key 'rules.0.rnak'; the keys there are {SETTINGS_KEYS}, pattern",
        ),
        ({"default": {"fromat": "mps"}}, f"{SETTINGS_KEYS}; did you mean 'format'?"),
        ({"format": "mps"}, "; format is a key of default: {default: {format: ...}}"),
        ({"default": {"rank": {"enrgy": 0.5}}}, f"unknown rank policy 'enrgy'; {TAGS}"),
        ({"default": {"rank": {"param_ratio": 0.5}}}, "evbmf; did you mean 'params_ratio'?"),
        ({"default": {"format": "Tuker"}}, "cp, mps, svd, tucker; did you mean 'tucker'?"),
        ({"budget": 0.25}, "budget: a budget is a mapping such as {params: 0.25}, got 0.25"),
        ({"budget": {"params": 25}}, "got 25: a budget is a part of what the dense model takes, such as"),
        ({"budget": {"param": 0.25}}, "latency_from; did you mean 'params'?"),
        (
            {"default": {"format": {"name": "svd", "cuts": "a"}}},
            "format 'svd' has no option 'cuts'; its options are cut",
        ),
        (
            {"default": {"rank": 0.5}},
            f"a rank is one tagged policy, such as {{params_ratio: 0.5}}, got 0.5; {TAGS}",
        ),
        ({"default": {"rank": 8}}, "a rank is one tagged policy, such as {fixed: 8}, got 8"),
        ({"default": {"rank": math.inf}}, "a rank is one tagged policy, such as {energy: 0.95}, got inf"),
        ({"default": {"rank": "energy"}}, "a rank is one tagged policy"),
        ({"default": {"rank": None}}, "a rank is one tagged policy"),
        ({"default": {"rank": {}}}, "a rank is one tagged policy"),
        ({"default": {"rank": {"energy": 0.5, "fixed": 3}}}, "a rank is one tagged policy"),
        ({"default": {"format": "ring"}}, "unknown format 'ring'; the formats are cp, mps, svd, tucker"),
        ({"default": {"format": 0.25}}, "unknown format 0.25"),
        ({"default": {"format": {"name": "svd", "cut": "out"}}}, "a cut is written"),
        ({"default": {"rank": {"fixed": 0}}}, "fixed ranks are whole numbers from 1 on, got 0"),
        ({"default": {"rank": {"fixed": []}}}, "fixed ranks are whole numbers"),
        ({"default": {"rank": {"fixed": [3, 0]}}}, "fixed ranks are whole numbers from 1 on, got [3, 0]"),
        ({"default": {"rank": {"fixed": 2.5}}}, "fixed ranks are whole numbers"),
        ({"default": {"rank": {"fixed": True}}}, "fixed ranks are whole numbers"),
        ({"default": {"rank": {"fixed": "3"}}}, "fixed ranks are whole numbers"),
        ({"default": {"min_rank": 0}}, "default.min_rank: input should be greater than or equal to 1, got 0"),
        ({"default": {"round_to": -8}}, "default.round_to"),
        ({"default": {"round_to": 2.5}}, "default.round_to"),
        ({"rules": [{}]}, "'rules.0.pattern' is missing"),
        ({"rules": [{"pattern": ""}]}, "rules.0.pattern"),
        ({"rules": [{"pattern": "re:("}]}, "'re:(' is not a regular expression"),
        ({"rules": {"pattern": "a"}}, "rules: input should be a list"),
        ({"rules": [{"pattern": "a", "keep_dense": "maybe"}]}, "rules.0.keep_dense"),
        ({"keep_dense": "stem"}, "keep_dense: input should be a list, got 'stem'"),
        ({"keep_dense": [3]}, "keep_dense.0: input should be a valid string, got 3"),
        ({"allow_larger": "perhaps"}, "allow_larger"),
        ({"version": 2}, "version: input should be 1, got 2"),
        ({"version": None}, "version"),
        ({"default": None}, "default"),
        ({1: 2}, "1"),
    ],
    ids=str,
)
def test_misuse_is_one_line_that_says_what_was_wanted(value, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        Spec.parse(value)
    assert one_line(caught.value).startswith("spec: ")


@pytest.mark.parametrize("policy", [ParamsRatio, Energy, RelError, EVBMF])
@pytest.mark.parametrize("value", [0, -0.1, 1.1, math.nan, math.inf, True, "0.5", None, [0.5]], ids=str)
def test_a_fraction_is_above_zero_and_at_most_one(policy, value):
    with pytest.raises(ValueError, match=f"{policy.tag} is a number above 0 and at most 1, got") as direct:
        policy(value)
    with pytest.raises(ValueError, match=re.escape(str(direct.value))) as caught:
        Spec.parse({"default": {"rank": {policy.tag: value}}})
    one_line(caught.value)


@pytest.mark.parametrize("pattern", ["re:(", "re:[a", "re:*"])
def test_an_expression_that_does_not_compile_is_refused_in_python_too(pattern):
    with pytest.raises(ValueError, match="is not a regular expression"):
        Rule(pattern=pattern)


@pytest.mark.parametrize("value", [3, None, ["default"], torch.ones(3, 3)], ids=lambda v: type(v).__name__)
def test_a_spec_of_another_type_is_a_type_error(value):
    with pytest.raises(TypeError, match="a spec is a Spec, a mapping or a path to a file, got") as caught:
        Spec.parse(value)
    one_line(caught.value)


def test_a_value_that_prints_over_many_lines_gives_one():
    with pytest.raises(ValueError, match="a rank is one tagged policy") as caught:
        Spec.parse({"default": {"rank": torch.ones(3, 3)}})
    one_line(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("absent.yaml", None, FileNotFoundError, "there is no spec file"),
        ("spec.txt", "version: 1", ValueError, "a spec file ends in .json, .toml, .yaml, .yml, got spec.txt"),
        ("spec", "version: 1", ValueError, "a spec file ends in"),
        ("spec.json", "{", ValueError, "is not valid JSON"),
        ("spec.toml", "a = ", ValueError, "is not valid TOML"),
        ("spec.yaml", "a: [", ValueError, "is not valid YAML"),
        ("spec.yaml", "? [a]\n: b", ValueError, "is not valid YAML"),
        ("spec.yaml", "!!python/object:os.system {}", ValueError, "is not valid YAML"),
        ("spec.yaml", "!!int ''", ValueError, "is not valid YAML"),
        ("spec.yaml", "!!timestamp x", ValueError, "is not valid YAML"),
        ("spec.yaml", "[" * 3000, ValueError, "is not valid YAML"),
        ("spec.json", "[" * 300000, ValueError, "is not valid JSON"),
        ("spec.yaml", "", ValueError, "got None"),
        ("spec.yaml", "- a\n- b", ValueError, "got ['a', 'b']"),
        ("spec.yaml", "&a [*a]", ValueError, "top level"),
        ("spec.yaml", "default: &a {rank: *a}", ValueError, "default.rank"),
        ("spec.yaml", "version: 2", ValueError, "version: input should be 1, got 2"),
        ("spec.json", b"\xff\xfe", ValueError, "is not a text file"),
        ("spec.json", "[1]", ValueError, "got [1]"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, kind, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=re.escape(words)) as caught:
        Spec.parse(path)
    assert name in one_line(caught.value)


def test_a_folder_is_no_spec(tmp_path):
    (tmp_path / "spec.yaml").mkdir()
    with pytest.raises(ValueError, match="is not a text file"):
        Spec.parse(tmp_path / "spec.yaml")


def test_a_spec_is_written_as_json_or_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"a spec is written as \.json or \.yaml, got spec\.toml"):
        Spec().save(tmp_path / "spec.toml")
    assert not list(tmp_path.iterdir())


def test_compress_and_make_plan_take_a_path(tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Conv2d(8, 8, 3) for _ in range(3)))
    Spec.parse({"default": {"format": "svd", "rank": {"fixed": 3}}}).save(tmp_path / "spec.yaml")
    for path in (tmp_path / "spec.yaml", str(tmp_path / "spec.yaml")):
        assert tnc.make_plan(model, path).compressed[0].ranks == (3,)
        assert tnc.compress(model, path)[1].ranks == (3,)


# --- whatever there is --------------------------------------------------------------------------------------

KEYS = ("format", "rank", "min_rank", "round_to", "pattern", "name", "cut", "order", "legs", "merged")
VALUES = ("svd", "mps", "tucker", "cp", "out|rest", "in spatial out", "all", "re:(", "*", "stem")
words = st.sampled_from([*FULL, *POLICIES, *KEYS, *VALUES])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | scalars, inner, max_size=3),
    max_leaves=8,
)
likely = st.fixed_dictionaries(
    {},
    optional={
        "version": st.just(1) | scalars,
        "default": st.dictionaries(words, values, max_size=3),
        "rules": st.lists(st.dictionaries(words, values, max_size=3), max_size=2) | values,
        "keep_dense": st.lists(scalars, max_size=2) | values,
        "allow_larger": scalars,
    },
)
ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)


def outcome(make, value):
    """What ``make`` returns, or the error that it may raise."""
    try:
        return make(value)
    except (ValueError, TypeError, OSError) as error:
        return error


def parses_or_is_one_line(value):
    found = outcome(Spec.parse, value)
    if isinstance(found, Spec):
        assert Spec.parse(found.to_dict()) == found
    else:
        assert not isinstance(found, ValidationError)
        one_line(found)


@ANY
@given(likely | st.dictionaries(words | scalars, values, max_size=4))
@example({"default": {"a\nb": 1}})
@example({"default": {"format": {"name": "mps", "order": "a\nb"}}})
@example({"default": {"rank": {"a\nb": 1}}})
@example({"default": {"rank": {(): 1}}})
def test_any_mapping_is_a_spec_or_one_line(value):
    parses_or_is_one_line(value)


@ANY
@given(st.text() | values.map(repr) | values.map(lambda value: yaml.dump(value)), st.sampled_from([*WRITERS]))
@example("a: !!float ''", ".yaml")
@example("a: !!bool x", ".yaml")
@example("a: 0b_", ".yaml")
@example("a: 2001-99-99", ".yaml")
@example("<<: 3", ".yaml")
@example("=", ".yaml")
@example("a = 1979-05-27", ".toml")
@example('"a\\nb" = 1', ".toml")
@example('{"a\\nb": 1}', ".json")
@example("1e999", ".json")
def test_any_text_in_a_file_is_a_spec_or_one_line(tmp_path, text, suffix):
    path = tmp_path / f"spec{suffix}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    parses_or_is_one_line(path)


@ANY
@given(values)
def test_anything_is_a_policy_or_an_error(value):
    policy = outcome(make_policy, value)
    if not isinstance(policy, ValueError):
        assert make_policy({policy.tag: policy.to_value()}) == policy
