"""Where is the model class? `modeling_mllm`, on the body in `modeling_body`; `registration` makes it known to transformers."""
