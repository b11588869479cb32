"""The Triton Python backend's model: serves pagedcore's engine with vLLM's inputs and outputs."""
