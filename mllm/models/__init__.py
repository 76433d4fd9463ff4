"""Where is the model class? `modeling_mllm`; `registration` makes it known to transformers' Auto classes."""
