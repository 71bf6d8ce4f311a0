"""The harness model: what `hf` answers, one adapter after another on one base, their strength."""

import lm_eval.evaluator
import lm_eval.tasks
import pytest
import torch
import transformers as tf
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig
from saved import save_adapter

from peft_steer import JointSteerLoraConfig, JolaConfig, LofitConfig, LoreftConfig, PostBlockSteerConfig
from peft_steer.evaluation import tasks
from peft_steer.evaluation.lm import PeftSteerLM


LM = {"task_type": "CAUSAL_LM"}
LORA = LoraConfig(r=2, target_modules="all-linear", **LM)
TASKS = ["listops_short", "list_max_min"]  # loglikelihoods of single tokens, and generation
FEW = {"n_train": 8, "n_validation": 8, "n_test": 8}
OURS = TaskManager(include_path=str(tasks.OUR_TASKS), include_defaults=False, metadata=FEW)
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # which asks pip for all packages


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory) -> str:
    """The tiny model, with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    tf.AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory) -> str:
    return save_adapter(base, LORA, tmp_path_factory.mktemp("lora"))


def evaluate(lm, limit=6, **options) -> dict[str, list]:
    """The answers to every request, by task."""
    output = simple_evaluate(lm, tasks=TASKS, task_manager=OURS, limit=limit, bootstrap_iters=0, **options)
    return {name: [sample["resps"] for sample in samples] for name, samples in output["samples"].items()}


def assert_equal(found: dict[str, list], expected: dict[str, list]) -> None:
    assert found.keys() == expected.keys()
    for name, answers in expected.items():
        for a, b in zip(found[name], answers, strict=True):
            for (x,), (y,) in zip(a, b, strict=True):
                assert x == (pytest.approx(y[0], abs=1e-4), y[1]) if isinstance(y, tuple) else x == y


# of the model, and of the run
OPTIONS = {
    "auto:2, chat": (
        {"batch_size": "auto:2", "max_batch_size": 4, "max_length": 96},
        {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "Add."},
    ),
    "parallelize": ({"parallelize": True, "max_cpu_memory": "8GiB", "dtype": "bfloat16"}, {}),
    "others": (
        {"revision": "main", "trust_remote_code": True, "add_bos_token": True, "softmax_dtype": "float64"},
        {"num_fewshot": 2},
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_hf_answers(base, lora, case, tmp_path):
    model, run = OPTIONS[case]
    model = {"pretrained": base, "peft": lora, "device": "cpu", "offload_folder": str(tmp_path), **model}
    expected = evaluate(HFLM(**model), **run)
    assert_equal(evaluate(PeftSteerLM(**model), **run), expected)


def test_quantized(base, lora):
    """bitsandbytes' flags, which `hf` hands to a model that does not take them."""
    flags = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    harness_model = PeftSteerLM(pretrained=base, peft=lora, device="cpu", **flags)
    assert "Linear4bit" in str(harness_model.model)
    quantization = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    plain = PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization), lora
    )
    for module in plain.modules():  # bitsandbytes' packed layers, on some processors, need wider models than this
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    expected = evaluate(HFLM(pretrained=plain.eval(), tokenizer=harness_model.tokenizer))
    assert_equal(evaluate(harness_model), expected)
    assert_equal(
        evaluate(PeftSteerLM(pretrained=base, peft=lora, device="cpu", load_in_4bit=False)),
        evaluate(HFLM(pretrained=base, peft=lora, device="cpu")),
    )
    with pytest.raises(ValueError, match="nothing is quantized without `load_in_4bit`"):
        PeftSteerLM(pretrained=base, device="cpu", bnb_4bit_quant_type="nf4")


# of every tuner class, and each with another way of being taken off the base
ADAPTERS = {
    "post_block": PostBlockSteerConfig(r=2, **LM),
    "last": PostBlockSteerConfig(r=2, positions="last", **LM),
    "prompt_tuning": PromptTuningConfig(num_virtual_tokens=2, **LM),
    "joint": JointSteerLoraConfig(r=2, steer_r=2, target_modules="all-linear", **LM),
    "loreft": LoreftConfig(r=2, modules_to_save=["lm_head"], **LM),
    "lora": LORA,
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], **LM),
    "lofit": LofitConfig(**LM),
    "jola": JolaConfig(**LM),
}


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> dict[str, str]:
    return {name: save_adapter(base, config, tmp_path_factory.mktemp(name)) for name, config in ADAPTERS.items()}


def test_one_adapter_after_another(base, adapters):
    """Each answers as on a base of its own, whatever was on the base before it."""
    model = PeftSteerLM(pretrained=base, peft=adapters["joint"], device="cpu", batch_size=4)
    weights = model.model.get_base_model().get_input_embeddings().weight
    answers = []
    for name, folder in [*adapters.items(), (None, None)]:
        model.load_adapter(folder)
        assert model.model.get_input_embeddings().weight is weights
        assert model.get_model_info().get("peft_sha") == (None if name is None else "")
        answers.append(evaluate(model, limit=2))
        alone = PeftSteerLM(pretrained=base, peft=folder, device="cpu", batch_size=4)
        assert_equal(evaluate(alone, limit=2), answers[-1])
    assert all(a != b for i, a in enumerate(answers) for b in answers[:i])
    given = PeftSteerLM(pretrained=model.model, tokenizer=model.tokenizer, peft=adapters["lora"], batch_size=4)
    assert_equal(evaluate(given, limit=2), answers[list(ADAPTERS).index("lora")])


def test_what_cannot_be_taken_off(base, tmp_path):
    """PiSSA subtracts what it starts from from the base's weights."""
    folder = save_adapter(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa", **LM), tmp_path)
    model = PeftSteerLM(pretrained=base, peft=folder, device="cpu")
    with pytest.raises(ValueError, match="has changed the base's own weights"):
        model.load_adapter(None)


@pytest.mark.parametrize("name", ["post_block", "joint", "lora"])
def test_scale(base, adapters, name):
    """A factor of the adapter's own strength: none at 0, the whole at 1."""
    ids = torch.arange(5, 15)[None]

    def logits(**options):
        with torch.no_grad():
            return PeftSteerLM(pretrained=base, device="cpu", **options).model(ids).logits

    plain = tf.AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(plain, adapters[name]).eval()
    for module in adapted.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    with torch.no_grad():
        assert torch.equal(logits(peft=adapters[name], scale=0.5), adapted(ids).logits)
    assert torch.equal(logits(peft=adapters[name], scale=0), logits())
    assert torch.equal(logits(peft=adapters[name], scale=1.0), logits(peft=adapters[name]))
    assert not torch.equal(logits(peft=adapters[name], scale=0.5), logits(peft=adapters[name]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": ["a", "b"]}, "must be the path of one adapter"),
        ({"scale": 0.5}, "there is none: set `peft`"),
        ({"peft": "a", "scale": "strong"}, "`scale='strong'` must be a finite number"),
        ({"peft": "a", "scale": float("nan")}, "`scale=nan` must be a finite number"),
        ({"peft": "a", "scale": True}, "`scale=True` must be a finite number"),
        ({"peft": "a", "delta": "b"}, "both 'peft' and 'delta'"),
        ({"peft": "ia3", "scale": 0.5}, "IA3 has none"),
    ],
)
def test_bad_model_arguments(base, adapters, options, message):
    options = {**options, "peft": adapters.get("ia3")} if options.get("peft") == "ia3" else options
    with pytest.raises(ValueError, match=message):
        PeftSteerLM(pretrained=base, device="cpu", **options)
