"""The paper's experiments that need a GPU: engines of every memory policy and the kernels, on a real device in real time."""
