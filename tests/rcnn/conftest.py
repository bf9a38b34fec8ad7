from support.crop_fixtures import deterministic, device, dtype, fresh_compiler, where_the_triton_kernel_runs  # noqa: F401
