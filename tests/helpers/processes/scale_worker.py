"""What each process does in the tests of accelerate's engines: `accelerate launch ... scale_worker.py FOLDER`, where
`FOLDER/jobs.json` says which adapters are trained and `FOLDER/base` is the model."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import joint_config, randomize
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import set_seed
from trl import SFTConfig, SFTTrainer

from peft_steer import JointSteerLoraConfig, LoreftConfig, SteerConfig


GLOBAL_BATCH, STEPS = 4, 4
JOBS = {
    "vector": lambda: SteerConfig(kind="vector", task_type="CAUSAL_LM"),
    "nonlinear": lambda: SteerConfig(kind="nonlinear", r=4, task_type="CAUSAL_LM"),
    "positions": lambda: SteerConfig(
        kind="nonlinear", r=4, positions="f2+l1", share_weights=False, task_type="CAUSAL_LM"
    ),
    "loreft": lambda: LoreftConfig(r=4, task_type="CAUSAL_LM"),
    "joint": lambda: joint_config(kind="nonlinear", r=4, task_type="CAUSAL_LM"),
    "joint_free": lambda: JointSteerLoraConfig(
        r=4, steer_r=4, target_modules="all-linear", orthogonal="none", task_type="CAUSAL_LM"
    ),
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
}


def sft(folder: Path, job: str, output: Path, processes: int = 1, resume: Path | None = None) -> SFTTrainer:
    """Trains the adapter `job` with TRL's trainer as it is, and saves it in `output`."""
    set_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32"), JOBS[job]())
    randomize(model)  # every parameter has a gradient from the first step on
    args = SFTConfig(
        str(output),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        learning_rate=1e-3,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        disable_tqdm=True,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate 1.15 reads this variable on accelerators only; on CPUs it runs plain DDP and does not say so
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(8, 12)]
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_model()
    return trainer


def main(folder: Path) -> None:
    report = {}
    for job, resumed in json.loads((folder / "jobs.json").read_text()).items():
        output = folder / job
        trainer = sft(folder, job, output, processes=2)
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        report[job] = {
            "engine": trainer.accelerator.distributed_type.value,
            "wrapper": type(trainer.model_wrapped).__name__,
            "is_peft": isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel),
            "dtensors": sum(isinstance(p, DTensor) for p in parameters) / len(parameters),
        }
        if resumed:
            sft(folder, job, folder / f"{job}_resumed", processes=2, resume=output / f"checkpoint-{STEPS // 2}")
    if PartialState().is_main_process:
        (folder / "report.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()
    os._exit(0)  # see peft_steer/bench/run/child.py: freeing a Gloo group at exit may hang


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
