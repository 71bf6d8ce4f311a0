"""Cells that are trained by reinforcement and by preference: what is recorded, what is saved, what a killed run keeps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_steer.bench.engines import make_engine
from peft_steer.bench.run.cell import Runner
from peft_steer.bench.run.divergence import divergence
from peft_steer.bench.scheduler import run_cells
from peft_steer.bench.store import Store
from tests.helpers.bench_cells import LORA, STEER, make_cell
