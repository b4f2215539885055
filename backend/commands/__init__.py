"""The subcommands of ``cuda-int4`` that are more than a call into one module."""
