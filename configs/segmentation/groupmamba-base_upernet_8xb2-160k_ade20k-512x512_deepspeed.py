# Gradients and optimiser states split over the GPUs by DeepSpeed (pip install deepspeed), bfloat16
_base_ = './groupmamba-base_upernet_8xb2-160k_ade20k-512x512.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='DeepSpeedStrategy',
    zero_optimization=dict(stage=2),
    bf16=dict(enabled=True),
    inputs_to_half=['inputs'])
optim_wrapper = dict(type='DeepSpeedOptimWrapper')
