"""Batches whose rows have prompts of different lengths."""

from positions_reference import tokens


def batch(lengths=(9, 6), prompts=(5, 4), seed=0):
    ids, mask = tokens(*lengths, seed=seed)
    labels = ids.clone().masked_fill(mask == 0, -100)
    for row, n in enumerate(prompts):
        labels[row, :n] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tokens_of_a_prompt():
    ids, mask = tokens(4, 8, side="left")
    return {"input_ids": ids, "attention_mask": mask}
