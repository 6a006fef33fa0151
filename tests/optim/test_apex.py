"""NVIDIA apex by stand-ins: what is taken for it, and that its optimizer works on our state."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from dalle_dist.errors import ConfigError
from dalle_dist.optim import apex
from dalle_dist.optim.adamw import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.1}


class FusedAdam(torch.optim.Optimizer):
    """What apex's does, by torch's kernel: one step count for a group; it must find state made."""

    def __init__(self, params, bias_correction=True, adam_w_mode=True, **options):
        super().__init__(params, {"bias_correction": bias_correction, **OPTIONS, **options})
        assert adam_w_mode

    def step(self):
        for group in self.param_groups:
            assert group["bias_correction"]
            group["step"] = group["step"] + 1 if "step" in group else 1
            for param in group["params"]:
                state = self.state[param]
                assert state, "our state was not handed over"
                torch._fused_adamw_(
                    [param.data], [param.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [],
                    [torch.tensor(float(group["step"]))], lr=group["lr"], eps=group["eps"],
                    beta1=group["betas"][0], beta2=group["betas"][1],
                    weight_decay=group["weight_decay"], amsgrad=False, maximize=False,
                )  # fmt: skip


@pytest.fixture
def nvidia(monkeypatch):
    package, optimizers, normalization = map(
        ModuleType, ("apex", "apex.optimizers", "apex.normalization")
    )
    optimizers.FusedAdam, normalization.FusedLayerNorm = FusedAdam, nn.LayerNorm
    for module in (package, optimizers, normalization):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_classes_are_found(nvidia):
    assert apex.fused_adam() is FusedAdam and apex.fused_layer_norm() is nn.LayerNorm


@pytest.mark.parametrize("find", [apex.fused_adam, apex.fused_layer_norm])
def test_another_package_of_that_name_is_not_taken_for_it(monkeypatch, find):
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    for name in ("apex.optimizers", "apex.normalization"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=r"^apex: apex\.\w+\.Fused\w+ cannot be imported"):
        find()
    for name in ("apex.optimizers", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ConfigError, match="`pip install apex` is another program"):
        find()


def test_a_package_whose_import_fails_anyhow_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('no\\nCUDA')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(ConfigError, match=r"\(no CUDA\)") as raised:
        apex.fused_adam()
    assert "\n" not in str(raised.value)


def test_nothing_is_imported_unless_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ConfigError, match=r"^apex: "):
        AdamW([nn.Parameter(torch.zeros(2))], implementation="apex")


def test_apex_steps_on_our_state(nvidia):
    """Two parameters of different step counts, saved and loaded on the way."""
    runs = []
    for implementation in ("torch", "apex"):
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(33)) for _ in range(2)]
        optimizer = AdamW(params, implementation=implementation, **OPTIONS)
        for step in range(1, 7):
            for number, param in enumerate(params):
                param.grad = torch.randn(33) if step > 2 * number else None
            optimizer.skip = step == 4
            optimizer.step()
            if step == 5:
                optimizer.load_state_dict(optimizer.state_dict())
        runs.append([*params, *(optimizer.state[params[1]][k] for k in ("exp_avg", "exp_avg_sq"))])
        assert [optimizer.state[p]["step"].item() for p in params] == [5, 3]
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("options", [{"moments": "16-bit"}, {"variance_clip": 5.0}])
def test_what_apex_cannot_do(nvidia, options):
    with pytest.raises(ConfigError, match="'apex' has neither 16-bit moments nor a variance clip"):
        AdamW([nn.Parameter(torch.zeros(2))], implementation="apex", **options)


def test_apex_is_not_given_a_gradient_that_it_would_misread(nvidia):
    param = nn.Parameter(torch.zeros(4))
    param.grad_dtype = None
    param.grad = torch.ones(4, dtype=torch.bfloat16)
    optimizer = AdamW([param], implementation="apex")
    with pytest.raises(ValueError, match=r"^grad: dtype torch\.bfloat16 is not torch\.float32"):
        optimizer.step()
    assert not param.any()
