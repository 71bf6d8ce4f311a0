"""Who follows a model in training; pushing to a server needs GPUs."""

from types import SimpleNamespace

import pytest
from engines import load, save_adapter, save_model
from vllm import EngineArgs

from peft_steer.serving.vllm.live import follow_server
from peft_steer.train.rollouts import check_followed
from peft_steer.tuners.steer import following


class Client:
    """TRL's, of a server that was started with these options."""

    def __init__(self, base, **options):
        engine = EngineArgs(model=base, skip_tokenizer_init=True, max_model_len=64, additional_config=options)
        self.config = engine.create_engine_config().additional_config

    def get_server_info(self):
        return {"additional_config": self.config}


def test_follow_server(tmp_path):
    base = save_model(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", kind="nonlinear")
    model = load(base, adapter)
    follower = follow_server(model, Client(base, peft_steer={"adapter": adapter}))
    assert follower.names == {(f"model.layers.{i}", letter) for i in range(3) for letter in "AB"}
    for _ in range(2):  # TRL walks once for the names, and once to push
        model.merge_adapter()
        assert sum(".live_" in name for name, _ in model.named_parameters()) == 6
        model.unmerge_adapter()  # what a server received cannot be told from here
    assert following.followers(model.base_model) == [follower]

    other = save_adapter(base, tmp_path / "other", kind="nonlinear", r=2)
    tanh = save_adapter(base, tmp_path / "tanh", kind="nonlinear", activation="tanh")
    with pytest.raises(ValueError, match=r"structure differs.*such as at 'base_model"):
        follow_server(model, Client(base, peft_steer={"adapter": other}))
    with pytest.raises(ValueError, match="activation='tanh', the model in training has 'silu'"):
        follow_server(model, Client(base, peft_steer={"adapter": tanh}))
    with pytest.raises(ValueError, match="The vLLM server does not steer"):
        follow_server(model, Client(base))


def test_the_check_before_the_first_step(tmp_path):
    """An engine that does not follow, or follows with fewer edits than are in training, stops the run."""
    base = save_model(tmp_path / "base")
    model = load(base, save_adapter(base, tmp_path / "adapter", kind="vector"))
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer = SimpleNamespace(args=SimpleNamespace(use_vllm=True), model=model, accelerator=accelerator)
    names = {(f"model.layers.{i}", "v") for i in range(3)}
    with pytest.raises(RuntimeError, match="3 modules are steered, and no vLLM engine follows them"):
        check_followed(trainer)
    fewer = following.Follower(names - {("model.layers.1", "v")})
    following.follow(model.base_model, fewer)
    with pytest.raises(RuntimeError, match="3 modules are steered"):
        check_followed(trainer)
    whole = following.Follower(names)
    following.follow(model.base_model, whole)
    assert check_followed(trainer) == 3
    trainer.args.use_vllm = False
    assert check_followed(trainer) == 0
