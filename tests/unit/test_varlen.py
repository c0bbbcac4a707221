"""Which attention kernel is used: flash-attn is imported once, every kernel is tried on a pair, and one line says what
is installed and not used."""

import importlib
import sys

import pytest
import torch
from varlen_stand_ins import flash_stand_in, torch_stand_in

import mdpo.forward.varlen
from mdpo.forward.varlen import flash, flash_attn, kernels, torch_varlen

DEVICE = torch.device("cpu")  # in a GPU's place


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    flash_attn.cache_clear()
    kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_stand_in)
    yield
    flash_attn.cache_clear()
    kernels.cache_clear()
    sys.modules.pop("flash_attn", None)


def installed(folder, monkeypatch, code: str, version: str) -> None:
    """A package flash_attn as pip leaves it."""
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn/__init__.py").write_text(code)
    (folder / f"flash_attn-{version}.dist-info").mkdir()
    (folder / f"flash_attn-{version}.dist-info/METADATA").write_text(f"Name: flash-attn\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


WORKS = "from varlen_stand_ins import flash_stand_in as flash_attn_varlen_func"


def test_none_is_installed(capsys):
    assert flash_attn() == (None, "flash-attn is not installed")
    assert kernels(DEVICE) == {"torch's varlen attention": torch_varlen}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("version", ["2.6.3", "2.8.3", "2.8.3.post1", "2.7.4+cu12torch2.13"])
def test_one_that_works(version, tmp_path, monkeypatch, capsys):
    installed(tmp_path, monkeypatch, WORKS, version)
    assert flash_attn() == (flash_stand_in, None)
    assert list(kernels(DEVICE).values()) == [flash, torch_varlen]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("code", "version", "why"),
    [
        ("", "4.0.0", "cannot be imported (cannot import name 'flash_attn_varlen_func'"),
        ("raise ImportError('undefined symbol: _ZN3c104cuda')", "2.8.3", "cannot be imported (undefined symbol"),
        ("raise OSError('libcudart.so.11: no such file')", "2.8.3", "cannot be imported (libcudart"),
        ("raise RuntimeError", "2.8.3", "cannot be imported (RuntimeError)"),
        (WORKS, "1.0.9", "is of version 1.0.9; from 2.6 up to 3 is known here"),
        (WORKS, "3.0.0", "is of version 3.0.0"),
        ("def flash_attn_varlen_func(*a, **k): raise RuntimeError('no kernel image')", "2.8.3", "no kernel image"),
        ("def flash_attn_varlen_func(q, *a, **k): return q", "2.8.3", "does not give what plain attention gives"),
        ("def flash_attn_varlen_func(q, k): return q", "2.8.3", "unexpected keyword argument"),
    ],
)
def test_one_that_does_not_is_one_line(code, version, why, tmp_path, monkeypatch, capsys):
    installed(tmp_path, monkeypatch, code, version)
    for _ in range(2):
        assert kernels(DEVICE) == {"torch's varlen attention": torch_varlen}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and why in said and said.endswith(". torch's varlen attention is.\n")


def test_torchs_own_is_tried_too(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nand more")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", broken)
    assert kernels(DEVICE) == {}
    line = "attention: torch's varlen attention is not used: FlashAttention only supports Ampere GPUs or newer. "
    assert capsys.readouterr().out == line + "Attention by run is.\n"


def test_older_gpus_have_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernels(DEVICE) == {}


def test_the_pair_that_is_tried_has_a_shared_prefix():
    """Rejected's first token, at 12, sees the prefix 0 … 3 and itself: a kernel that aligns its mask at the first key
    is noticed."""
    seen = mdpo.forward.varlen._seen(DEVICE)
    assert seen[12].nonzero().flatten().tolist() == [0, 1, 2, 3, 12]
    assert seen[11].nonzero().flatten().tolist() == list(range(12))

    def at_the_first_key(q, k, v, q_begins, k_begins, max_q, max_k, scale, window_size, enable_gqa):
        ends = k_begins[:-1] + (q_begins[1:] - q_begins[:-1])
        keep = torch.cat([torch.arange(a, b) for a, b in zip(k_begins[:-1].tolist(), ends.tolist(), strict=True)])
        return torch_stand_in(q, k[keep], v[keep], q_begins, q_begins, max_q, max_q, scale, window_size, enable_gqa)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", at_the_first_key)
        assert mdpo.forward.varlen._fails(torch_varlen, DEVICE) == "it does not give what plain attention gives"
    assert mdpo.forward.varlen._fails(torch_varlen, DEVICE) is None
