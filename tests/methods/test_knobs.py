from dataclasses import asdict

import pytest

from whit.errors import KnobError
from whit.methods import available_methods, knobs, make_method, method_class, register_method
from whit.methods.rtn import RTN


def test_methods_register_themselves():
    known = available_methods()
    assert {"rtn", "gptq", "kmeans"} <= set(known)
    assert list(known) == sorted(known)
    assert all(cls.summary for cls in known.values())


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(KnobError, match=r"'gtpq'; did you mean 'gptq'\? \(known: .*rtn"):
        method_class("gtpq")


def test_an_unknown_knob_suggests_the_nearest():
    with pytest.raises(KnobError, match=r"'rtn' has no knob 'group-sise'; did you mean 'group_size'"):
        make_method("rtn", {"group-sise": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "'bits' of method 'gptq' must be at least 1, got 0"),
        ({"bits": 9}, "must be at most 8, got 9"),
        ({"bits": 2.0}, "is of type int, got 2.0"),
        ({"bits": True}, "is of type int, got True"),
        ({"bits": None}, "is of type int, got None"),
        ({"bits": "two"}, "is of type int, got 'two'"),
        ({"group_size": -1}, "at least 0, got -1"),
        ({"symmetric": "perhaps"}, "is true or false, got 'perhaps'"),
        ({"symmetric": 1}, "is of type bool, got 1"),
        ({"damping": float("nan")}, "at least 0, got nan"),
        ({"damping": "much"}, "is of type float, got 'much'"),
    ],
)
def test_bad_values_are_quoted(options, message):
    with pytest.raises(KnobError, match=message):
        make_method("gptq", options)


def test_strings_become_the_type_of_the_knob():
    method = make_method("gptq", {"bits": "3", "group-size": "64", "act_order": "yes", "damping": "0.05"})
    assert method.to_json() == {
        "method": "gptq",
        "bits": 3,
        "group_size": 64,
        "symmetric": False,
        "act_order": True,
        "clip_steps": 0,
        "damping": 0.05,
    }
    assert make_method("gptq", {"damping": 0}).to_json()["damping"] == 0


def test_direct_construction_checks_too():
    with pytest.raises(KnobError, match="at most 8"):
        RTN(bits=12)


@pytest.mark.parametrize("name", ["rtn", "gptq", "kmeans"])
def test_json_rebuilds_the_method(name):
    method = make_method(name)
    fields = method.to_json()
    assert make_method(fields.pop("method"), fields) == method
    assert fields == asdict(method)


def test_every_knob_has_a_type_a_default_and_help():
    for cls in available_methods().values():
        for item in knobs(cls):
            assert isinstance(item.type, type)
            assert item.help


def test_two_methods_cannot_share_a_name():
    impostor = type("Impostor", (RTN,), {})
    with pytest.raises(ValueError, match="two methods are called 'rtn'"):
        register_method(impostor)
