"""Registry: lazy targets, unknown names, freezing."""

import sys

import pytest

from adallava.errors import AdaLlavaError, UnknownNameError
from adallava.registry import Registry


def make():
    registry: Registry[object] = Registry("token selector")
    registry.register("prumerge", "fractions:Fraction")
    registry.register("fastv", len)
    return registry


def test_get_and_names():
    registry = make()
    assert registry.names() == list(registry) == ["prumerge", "fastv"]
    assert len(registry) == 2
    assert "fastv" in registry
    assert "other" not in registry
    assert registry.get("fastv") is len
    assert registry.get("prumerge") is registry.get("prumerge")
    assert registry.get("prumerge").__name__ == "Fraction"


def test_targets_load_when_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a_lazy_target.py").write_text("thing = 'loaded'\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = make()
    registry.register("lazy", "a_lazy_target:thing")
    registry.freeze()
    assert registry.names()[-1] == "lazy"
    assert "a_lazy_target" not in sys.modules
    assert registry.get("lazy") == "loaded"


def test_unknown_name():
    with pytest.raises(UnknownNameError) as caught:
        make().get("prumrge")
    message = "unknown token selector 'prumrge'. Did you mean 'prumerge'? Known: prumerge, fastv."
    assert str(caught.value) == message
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, AdaLlavaError)
    with pytest.raises(UnknownNameError, match="Known: none"):
        Registry("task").get("x")


def test_registering():
    registry = make()
    with pytest.raises(ValueError, match="'fastv' is registered already"):
        registry.register("fastv", len)
    for target in ("module", "module:", ":thing"):
        with pytest.raises(ValueError, match="expected text of the form 'module:attribute'"):
            registry.register("new", target)
    registry.freeze()
    with pytest.raises(RuntimeError, match="cannot register token selector 'new': the registry is frozen"):
        registry.register("new", len)
