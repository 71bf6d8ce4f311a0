"""One call of an optimizer's `step` is one update on unscaled gradients, or none: under a `GradScaler`, with closures,
and for parameters that the loss does not reach."""

import pytest
import torch
from head_training import edits
from joint_models import joint, worst
from peft import get_peft_model
from tiny import adapter_state, inputs, make, randomize

from peft_steer import JolaConfig, LofitConfig


STEPS, SKIPPED = 5, (1, 3)  # those of which a gradient overflows


def penalized(config):
    model = get_peft_model(make(), config).train()
    randomize(model)
    return model


def periodic():
    model = joint(orthogonal="periodic", orthogonal_interval=2).train()
    randomize(model)
    return model


MODELS = {
    "lofit": lambda: penalized(LofitConfig(l1_lambda=0.05, selection_step=100)),
    "lofit, chosen": lambda: penalized(LofitConfig(l1_lambda=0.05, selection_step=2, num_heads=3)),
    "jola": lambda: penalized(JolaConfig(gate_schedule="cyclic", gate_steps=4)),
    "periodic": periodic,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
    # torch 2.13's leaves its momentum uninitialized if a first step is skipped, so without
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "fused adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}


def loss_of(model, step):
    torch.manual_seed(step)  # of JoLA's gates
    x = inputs(rows=4, seed=step)
    return model(**x, labels=x["input_ids"]).loss


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def unscaled(name, optimizer_name):
    """The training without a scaler, and without the steps that it skips."""
    model = MODELS[name]()
    optimizer = OPTIMIZERS[optimizer_name](trained(model))
    for step in range(STEPS):
        if step not in SKIPPED:
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled before", "unscaled within"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_scaling(name, optimizer_name, unscale):
    model = MODELS[name]()
    optimizer = OPTIMIZERS[optimizer_name](trained(model))
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=1)
    for step in range(STEPS):
        scaler.scale(loss_of(model, step)).backward()
        if step in SKIPPED:
            trained(model)[0].grad.view(-1)[0] = torch.inf
        if unscale:  # as a trainer that clips gradients does
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if name == "periodic":  # steps 0 and 2 are the first two updates; what is skipped leaves the weights alone
            assert (worst(model) < 1e-5) == (step in (2, 3)), step
    expected = adapter_state(unscaled(name, optimizer_name))
    for key, x in adapter_state(model).items():
        torch.testing.assert_close(x, expected[key], rtol=1e-3, atol=1e-5)
    if name != "periodic":
        assert {int(edit.steps) for edit in edits(model)} == {STEPS - len(SKIPPED)}


@pytest.mark.parametrize("optimizer_name", ["sgd", "fused sgd"])
@pytest.mark.parametrize("name", ["lofit", "jola"])
def test_a_penalty_needs_no_gradient_of_the_loss(name, optimizer_name):
    """As where a forward pass leaves out a layer: the update is that of the same gradient, zero."""
    found = []
    for gradient in (None, 0.0):
        model = MODELS[name]()
        optimizer = OPTIMIZERS[optimizer_name](trained(model))
        for p in trained(model):
            p.grad = None if gradient is None else torch.zeros_like(p)
        before = adapter_state(model)
        optimizer.step()
        found.append(adapter_state(model))
        moved = {key.rpartition(".")[2] for key, x in before.items() if not torch.equal(x, found[-1][key])}
        assert moved == ({"A", "steps"} if name == "lofit" else {"log_g1", "log_g2", "steps"})
    assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())


def test_what_is_not_trained_gets_no_penalty():
    """Neither an adapter that is frozen, nor a parameter that the optimizer does not have."""
    model = MODELS["lofit"]()
    model.add_adapter("frozen", LofitConfig(l1_lambda=0.05))
    randomize(model)
    everything = [p for name, p in model.named_parameters() if "steer_edit" in name]
    optimizer = torch.optim.SGD([p for p in everything if p is not edits(model)[0].A], lr=0.1)
    before = adapter_state(model, "frozen")
    loss_of(model, 0).backward()
    gradient = edits(model)[0].A.grad.clone()
    optimizer.step()
    assert all(torch.equal(x, before[key]) for key, x in adapter_state(model, "frozen").items())
    assert all(edit.A.grad is None for edit in edits(model, "frozen"))
    assert torch.equal(edits(model)[0].A.grad, gradient)
    assert {int(edit.steps) for edit in edits(model)} == {1}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_closures(name, named):
    """Gradients that are made within the step, as Lightning has them made, have the penalty as well."""
    found = []
    for closed in (False, True):
        model = MODELS[name]()
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for step in range(3):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if not closed:
                closure()
                optimizer.step()
            elif named:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
        found.append(adapter_state(model))
    assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())


def test_an_optimizer_that_unscales_by_itself_is_refused():
    class Old(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, grad_scaler=None):
            return super().step(closure)

    model = MODELS["lofit"]()
    optimizer = Old(trained(model), lr=0.1)
    scaler = torch.amp.GradScaler(device="cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="Old unscales its gradients within"), pytest.warns(FutureWarning):
        scaler.step(optimizer)
