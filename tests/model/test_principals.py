"""Who asks: local is who stands at the machine, and only a part of the environment travels."""

from __future__ import annotations

from vespera_exec.model.principal import LOCAL, Caller, allowed_env


def test_a_caller_is_local_unless_a_token_or_the_network_brought_it() -> None:
    assert Caller().is_local
    assert Caller().principal == LOCAL
    assert not Caller(over_tcp=True).is_local
    assert not Caller("ci").is_local
    assert dict(Caller().env) == {}


def test_only_the_allowed_part_of_an_environment_travels() -> None:
    seen = allowed_env({"PATH": "/bin", "LANG": "C", "API_KEY": "secret", "LD_PRELOAD": "x.so"})
    assert seen == {"PATH": "/bin", "LANG": "C"}
