"""Charts with questions and exact answers, drawn from anybody's tables (`mllm data build charts`)."""
