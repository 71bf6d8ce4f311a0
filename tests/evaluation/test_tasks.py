"""Any lm-eval task as training data: the strings that the harness scores, never from the evaluated split."""

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_tasks import make_task
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer.evaluation import tasks
from peft_steer.evaluation.datasets import dpo_dataset, encode, grpo_dataset, sft_dataset, tokenize


def multiple_choice(**config) -> ConfigurableTask:
    defaults = {"output_type": "multiple_choice", "doc_to_choice": "options", "doc_to_target": "answer"}
    return make_task(**{**defaults, **config})


@pytest.mark.parametrize(
    ("task", "prompts", "completions"),
    [
        (multiple_choice(), ["Q: 1+1?\nA:", "Q: 2+2?\nA:"], [" two", " four"]),
        (multiple_choice(target_delimiter=""), ["Q: 1+1?\nA:", "Q: 2+2?\nA:"], ["two", "four"]),
        (multiple_choice(description="Add. "), ["Add. Q: 1+1?\nA:", "Add. Q: 2+2?\nA:"], [" two", " four"]),
        (multiple_choice(doc_to_target="text"), ["Q: 1+1?\nA:", "Q: 2+2?\nA:"], [" two", " four"]),
        # Winogrande's form: the options are the contexts, the text field is the index of the right one.
        (
            multiple_choice(doc_to_text="answer", doc_to_target="is right"),
            ["two", "four"],
            [" is right", " is right"],
        ),
        (
            make_task(output_type="generate_until", doc_to_target="text", generation_kwargs={"until": ["\n"]}),
            ["Q: 1+1?\nA:", "Q: 2+2?\nA:"],
            [" two", " four"],
        ),
        (
            make_task(output_type="generate_until", doc_to_target="answer", doc_to_choice="options"),
            ["Q: 1+1?\nA:", "Q: 2+2?\nA:"],
            [" two", " four"],
        ),
    ],
)
def test_pairs_are_what_the_harness_scores(task, prompts, completions):
    data = sft_dataset(task)
    assert list(data["prompt"]) == prompts
    assert list(data["completion"]) == completions


def test_never_the_evaluated_split():
    with pytest.raises(ValueError, match="trained on 'test', the split that it is evaluated on"):
        sft_dataset(multiple_choice(training_split="test"))
    validated = multiple_choice(training_split="validation")
    sft_dataset(validated)  # the test split is evaluated, so this is fair
    tasks.evaluate_on(validated, "validation")
    with pytest.raises(ValueError, match="trained on 'validation', the split that it is evaluated on"):
        sft_dataset(validated)


@pytest.mark.parametrize("fewshot_split", ["train", None])
def test_few_shot_prompts_are_the_harness_prompts_without_the_document_itself(fewshot_split):
    rows = {"question": [f"{i}+1?" for i in range(4)], "text": [f"<{i + 1}>" for i in range(4)]}
    data = {split: datasets.Dataset.from_dict(rows) for split in ("train", "test")}
    options = {"output_type": "generate_until", "doc_to_target": "text", "custom_dataset": lambda **_: data}
    task = make_task(**options, validation_split=None, fewshot_split=fewshot_split, num_fewshot=3)
    task.set_fewshot_seed(1234)
    for i, (prompt, completion) in enumerate(zip(*sft_dataset(task)[:].values(), strict=True)):
        *shots, question = prompt.split("\n\n")
        assert question == f"Q: {i}+1?\nA:"
        assert completion == f" <{i + 1}>"
        assert sorted(shots) == [f"Q: {j}+1?\nA: <{j + 1}>" for j in range(4) if j != i]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_written_out_examples_are_in_every_prompt(split):
    """Also in that of a training document that is one of them; on validation the harness would leave it out, and then
    has too few."""
    task, _ = tasks.load_task("list_max_min")
    tasks.evaluate_on(task, split)
    prompts = grpo_dataset(task)["prompt"]
    assert "max(3,7)=7\nmin(5,2,8)=2\nmax(3,7)=" in prompts
    assert all(prompt.startswith("max(3,7)=7\nmin(5,2,8)=2\nm") for prompt in prompts)


def test_chat_messages_carry_the_harness_text():
    task = multiple_choice(num_fewshot=1, fewshot_config={"sampler": "first_n"}, fewshot_split="validation")
    row = sft_dataset(task, apply_chat_template=True, system_instruction="Add.")[1]
    assert row["prompt"] == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "Q: 1+1?\nA:"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Q: 2+2?\nA:"},
    ]
    assert row["completion"] == [{"role": "assistant", "content": "four"}]


def test_preferences_are_the_right_choice_and_a_wrong_one():
    task = multiple_choice(doc_to_choice=["one", "two", "three", "four"])
    data = dpo_dataset(task)
    assert list(data["prompt"]) == ["Q: 1+1?\nA:", "Q: 2+2?\nA:"]
    assert list(data["chosen"]) == [" one", " two"]
    assert set(data["rejected"]) <= {" one", " two", " three", " four"}
    assert all(row["rejected"] != row["chosen"] for row in data)
    assert data[:] == dpo_dataset(task)[:]
    several = multiple_choice(doc_to_choice=["a", "b", "c", "a"], doc_to_target=lambda doc: [0, 1])
    assert all(set(dpo_dataset(several, seed=seed)["rejected"]) == {" c"} for seed in range(5))
    with pytest.raises(ValueError, match="has no wrong choice"):
        dpo_dataset(multiple_choice(doc_to_choice=["a", "a"]))
    with pytest.raises(ValueError, match="none of its choices"):
        dpo_dataset(multiple_choice(doc_to_target=lambda doc: -1))
    with pytest.raises(ValueError, match="its choices are in the prompt"):
        dpo_dataset(multiple_choice(doc_to_text="answer", doc_to_target="is right"))


def test_what_cannot_be_trained_on():
    with pytest.raises(ValueError, match="watched in training on 'validation', the split that it is evaluated on"):
        sft_dataset(multiple_choice(test_split=None), "validation")
    shots = {"num_fewshot": 1, "fewshot_split": "test"}
    with pytest.raises(ValueError, match="takes its examples from 'test', the split that it is evaluated on"):
        sft_dataset(multiple_choice(**shots))
    with pytest.raises(ValueError, match="begins the answer itself"):
        sft_dataset(multiple_choice(gen_prefix="It is"), apply_chat_template=True)
    with pytest.raises(ValueError, match="has no answer"):
        sft_dataset(make_task(output_type="generate_until", doc_to_target=lambda doc: None))
    with pytest.raises(ValueError, match="only of 'generate_until'"):
        grpo_dataset(multiple_choice())

    with pytest.raises(ValueError, match="has no training split"):
        sft_dataset(multiple_choice(training_split=None))
    with pytest.raises(ValueError, match="no such training data can be made of output_type 'loglikelihood_rolling'"):
        sft_dataset(make_task(output_type="loglikelihood_rolling", doc_to_target="text"))


def test_evaluated_split():
    task, _ = tasks.load_task("listops_short")
    test, validation = list(task.test_docs()["expression"]), list(task.validation_docs()["expression"])
    tasks.evaluate_on(task, "test")
    assert list(task.eval_docs["expression"]) == test
    tasks.evaluate_on(task, "validation")
    assert list(task.eval_docs["expression"]) == validation
    with pytest.raises(ValueError, match="has no test split"):
        tasks.evaluate_on(task, "test")
    with pytest.raises(ValueError, match="'dev' is not 'validation' or 'test'"):
        tasks.evaluate_on(task, "dev")


@pytest.mark.parametrize("end", [False, True])
def test_tokens_are_the_harness_tokens(tiny_llama, end):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    harness = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(tiny_llama), tokenizer=tokenizer)
    pairs = datasets.Dataset.from_dict(
        {"prompt": ["max(1,2)=", "Q: a?\nA:", "A: "], "completion": ["2", " b c", "two hundred"]}
    )
    for pair, row in zip(pairs, tokenize(pairs, tokenizer, end=end), strict=True):
        context, continuation = harness._encode_pair(pair["prompt"], pair["completion"])
        learned = [token for token, learn in zip(row["input_ids"], row["completion_mask"], strict=True) if learn]
        assert row["input_ids"][: len(context)] == context
        assert learned == continuation + ([tokenizer.eos_token_id] if end else [])


@pytest.mark.parametrize("end", [False, True])
def test_a_tokenizer_that_ends_every_text(tiny_llama, end):
    plain, ending = (AutoTokenizer.from_pretrained(tiny_llama) for _ in range(2))
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", plain.eos_token_id)]
    )
    assert ending("a").input_ids == [*plain("a").input_ids, plain.eos_token_id]
    for prompt, completion in (("1+1=", "2"), ("", "two"), ("<eos>", "two")):
        assert encode(prompt, completion, ending, end) == encode(prompt, completion, plain, end)


def test_a_pair_without_an_answer(tiny_llama):
    pairs = datasets.Dataset.from_dict({"prompt": ["max(1,2)="], "completion": [""]})
    with pytest.raises(ValueError, match="no token is left to learn"):
        tokenize(pairs, AutoTokenizer.from_pretrained(tiny_llama), end=False)


def test_a_misspelt_task():
    with pytest.raises(ValueError, match=r"did you mean .*'listops_short'"):
        tasks.load_task("listops_shrot")
