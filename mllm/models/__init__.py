"""Where is the model class? Importing this package registers it with transformers' Auto classes."""

from mllm.models.registration import register

register()
