"""Every task type of PEFT that has a decoder or an encoder stack: training moves the adapter and the head, a file
brings both back."""

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from tiny import SMALL, D, make, randomize, steer_layers

from peft_steer import SteerConfig


BERT = tf.BertConfig(**{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")})
LLAMA = tf.LlamaConfig(**SMALL)
IDS = torch.arange(3, 17).view(2, 7)
TASKS = {
    "CAUSAL_LM": (tf.LlamaForCausalLM, LLAMA, {"labels": IDS}),
    "SEQ_CLS-decoder": (tf.LlamaForSequenceClassification, LLAMA, {"labels": torch.tensor([0, 1])}),
    "SEQ_CLS-encoder": (tf.BertForSequenceClassification, BERT, {"labels": torch.tensor([0, 1])}),
    "TOKEN_CLS": (tf.BertForTokenClassification, BERT, {"labels": IDS % 2}),
    "QUESTION_ANS": (
        tf.BertForQuestionAnswering,
        BERT,
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
    "FEATURE_EXTRACTION": (tf.BertModel, BERT, {}),
    "SEQ_2_SEQ_LM": (tf.T5ForConditionalGeneration, None, {"labels": IDS}),
}


def base(task):
    cls, config, _ = TASKS[task]
    torch.manual_seed(0)
    return make("t5") if config is None else cls(config).eval()


@pytest.mark.parametrize("task", TASKS)
def test_task_type(tmp_path, task):
    labels = TASKS[task][2]
    model = get_peft_model(base(task), SteerConfig(r=4, kind="linear", task_type=task.partition("-")[0])).train()
    randomize(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **labels)
    loss = out.loss if labels else out.last_hidden_state.square().mean()
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    heads = ("score.modules_to_save", "classifier.modules_to_save", "qa_outputs.modules_to_save")
    for name, p in model.named_parameters():
        trained = ".steer_edit." in name or any(head in name for head in heads)
        assert p.requires_grad == trained, name
        assert torch.equal(p, start[name]) != trained, name

    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(task), tmp_path)
    assert type(loaded) is type(model)
    x = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if task == "SEQ_2_SEQ_LM" else {})
    assert torch.equal(loaded(**x)[0], model(**x)[0])
    with loaded.disable_adapter():
        assert torch.equal(loaded(**x)[0], base(task)(**x)[0])
    assert len(steer_layers(loaded)) == (6 if task == "SEQ_2_SEQ_LM" else 3)
    assert loaded.peft_config["default"].hidden_size == D
