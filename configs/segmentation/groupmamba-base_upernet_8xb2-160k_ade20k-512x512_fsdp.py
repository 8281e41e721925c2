# Parameters, gradients and optimiser states split over the GPUs by PyTorch's FSDP
_base_ = './groupmamba-base_upernet_8xb2-160k_ade20k-512x512.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='FSDPStrategy',
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        use_orig_params=True,  # weight decay goes by the parameters' names
        auto_wrap_policy=dict(
            type='torch.distributed.fsdp.wrap.size_based_auto_wrap_policy',
            min_num_params=1_000_000)),
    state_dict_cfg='full')  # one file, as without FSDP
