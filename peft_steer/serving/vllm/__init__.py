"""vLLM with steering: the part that an engine imports once it is asked to steer (see `peft_steer_vllm.py`).

`options` what is asked for, `places` where it acts in vLLM's models, `layers` what acts there, `models` the model that
has them, `adapters` and `requests` what is served, `live` a model in training that an engine follows.
"""
