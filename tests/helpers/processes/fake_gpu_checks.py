"""What is run on a fake accelerator, in a process of its own: prints one JSON object, each check's name and traceback.

Each check runs the same on the CPU and on the device and compares values: the device's kernels are the CPU's.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import fake_gpu
import pandas as pd
import pytest
import torch
from accelerate import dispatch_model
from analysis_models import pair_of, random_texts
from joint_models import joint
from peft import PeftModel
from tiny import HEAD_KINDS, KINDS, adapted, inputs, randomize

from peft_steer import SteerConfig, orthogonality, project_
from peft_steer.analysis import linear, oracle, where
from peft_steer.analysis.distill.fitting import fit_blocks
from peft_steer.analysis.distill.students import adapter_of, distances
from peft_steer.analysis.inputs.pairs import Pair
from peft_steer.analysis.inputs.texts import Texts
from peft_steer.tuners.steer.merging import plan as merging_module


CHECKS: dict[str, Callable] = {}
FIRST = "fakegpu:0"
METHODS = {**KINDS, **HEAD_KINDS, "joint": {"method": "joint"}}


def check(name: str) -> Callable:
    def register(function: Callable) -> Callable:
        CHECKS[name] = function
        return function

    return register


def values(x):
    return x.held if isinstance(x, fake_gpu.OnDevice) else x


def same(make_model: Callable[[], torch.nn.Module], run: Callable, device: str = FIRST) -> None:
    """`run(model, device)` returns tensors that are equal on both and, on the device, on it."""
    expected = run(make_model(), "cpu")
    found = run(make_model().to(device), device)
    assert expected.keys() == found.keys()
    for name, x in found.items():
        assert x.device == torch.device(device), (name, x.device)
        atol = 1e-4 * expected[name].abs().max().item()  # (attention has another kernel there)
        torch.testing.assert_close(values(x), expected[name], rtol=1e-4, atol=atol, msg=name)


def trained(model, device):
    ids = inputs()["input_ids"].to(device)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(weights.values(), lr=1e-2, momentum=0.9)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = {f"{name}.grad": p.grad for name, p in weights.items() if p.grad is not None}
    optimizer.step()
    adam = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in weights.values()])
    for p, q in zip(adam.param_groups[0]["params"], weights.values(), strict=True):
        p.grad = q.grad
    adam.step()
    return {"loss": loss.detach(), **grads, **{name: p.detach() for name, p in weights.items()}}


for _name, _config in METHODS.items():
    check(f"train {_name}")(lambda config=_config: same(lambda: adapted(**config), trained))


@check("the choice of heads")
def choice():
    def run(model, device):
        ids = inputs()["input_ids"].to(device)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: x.double() for name, x in model.state_dict().items() if "steer_edit" in name and x.ndim}

    same(lambda: adapted(**HEAD_KINDS["lofit"], num_heads=3, selection_step=2), run)


@check("generate")
def generate():
    def run(model, device):
        ids = inputs()["input_ids"].to(device)
        mask = torch.ones_like(ids)
        return {"tokens": model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)}

    for config in ({"kind": "loreft"}, {"method": "joint"}, {"kind": "linear", "positions": "f1+l1"}):
        same(lambda config=config: adapted(**config), run)


@check("positions")
def positions():
    def run(model, device):
        ids = inputs()["input_ids"].to(device)
        labels = ids.clone()
        labels[:, :3] = -100
        return {"logits": model(input_ids=ids, labels=labels).logits.detach()}

    for spec in ("last", "prompt", "completion", "f1+l1"):
        same(lambda spec=spec: adapted(kind="linear", positions=spec), run)


@check("mixed rows")
def rows():
    def make_model():
        model = adapted(kind="linear")
        model.add_adapter("other", SteerConfig(kind="loreft", r=2))
        randomize(model, std=0.3)
        return model

    def run(model, device):
        ids = inputs(rows=3)["input_ids"].to(device)
        return {"logits": model(input_ids=ids, adapter_names=["default", "__base__", "other"]).logits.detach()}

    same(make_model, run)


@check("projection")
def projection():
    def run(model, device):
        project_(model)
        assert max(orthogonality(model).values()) < 1e-4
        return {name: p.detach() for name, p in model.named_parameters() if "W_down" in name}

    def make_model():
        model = joint(orthogonal="periodic", orthogonal_interval=2)
        randomize(model, std=0.5)
        return model

    same(make_model, run)


@check("merging")
def merging():
    def run(model, device):
        model.merge_adapter()
        ids = inputs()["input_ids"].to(device)
        merged = model(input_ids=ids).logits.detach()
        model.unmerge_adapter()
        return {"merged": merged, "unmerged": model(input_ids=ids).logits.detach()}

    plain = merging_module._plain  # which knows that the weights here are no ordinary ones
    merging_module._plain = lambda linear, refuse: linear
    try:
        same(lambda: adapted(kind="vector"), run)
    finally:
        merging_module._plain = plain


@check("two devices")
def two_devices():
    for config in ({"kind": "loreft"}, {"method": "joint"}):
        expected = adapted(**config)(**inputs()).logits
        model = adapted(**config)
        places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0}
        places |= {"model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
        base = model.get_base_model()
        for name, i in places.items():
            base.get_submodule(name).to(f"fakegpu:{i}")
        dispatch_model(base, {name: torch.device("fakegpu", i) for name, i in places.items()}, force_hooks=True)
        found = model(input_ids=inputs()["input_ids"].to(FIRST)).logits
        assert {p.device for p in base.model.layers[2].parameters()} == {torch.device("fakegpu:1")}
        torch.testing.assert_close(values(found), expected, rtol=1e-4, atol=1e-5)


def on(pair: Pair, device: str) -> Pair:
    return Pair(pair.base.to(device), pair.tuned.to(device), None)


def texts_on(device: str) -> Texts:
    texts = random_texts(rows=40)
    return Texts(texts.rows, texts.batch_size, texts.pad, device)


@check("analyses")
def analyses():
    tables = []
    for device in ("cpu", FIRST):
        pair, texts = on(pair_of(), device), texts_on(device)
        tables.append([where.measure(pair, texts), *oracle.measure(pair, texts),
                       linear.fit_maps(pair, texts, texts, [2])[1]])  # fmt: skip
    for expected, found in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(expected, found, rtol=1e-3, atol=1e-6)


@check("distil")
def distil():
    found = []
    for device in ("cpu", FIRST):
        pair, texts = on(pair_of(), device), texts_on(device)
        student = adapter_of(pair, fit_blocks(pair, texts, texts, r=2))
        assert isinstance(student, PeftModel)
        found.append(distances(pair, {"student": student}, texts)[0].summary()["kl"])
    assert abs(found[0] / found[1] - 1) < 1e-2


@check("control: a tensor that was made on the CPU")
def control():
    model = adapted(kind="linear").to(FIRST)
    edit = model.get_base_model().model.layers[1].steering.steer_edit["default"]
    edit.W_down = torch.nn.Parameter(torch.zeros(*edit.W_down.shape))
    with pytest.raises(RuntimeError, match="on the CPU"):
        model(input_ids=inputs()["input_ids"].to(FIRST))


if __name__ == "__main__":
    fake_gpu.register()
    results = {}
    with fake_gpu.MakesTensors(), fake_gpu.FakeGpu():
        for name, function in CHECKS.items():
            try:
                function()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(results))
