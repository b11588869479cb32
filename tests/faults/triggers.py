"""What a prompt has to hold for the faulty model to fail."""

from __future__ import annotations

# Token ids, and what they do to the step that computes them.
STEP_RAISES, SAMPLER_RAISES, NAN_LOGITS, SLOW_STEP = 49001, 49002, 49003, 49004
SLOW_SECONDS = 3.0

# Texts that a prompt begins with. What follows REFUSE is the number k; 0 ends it.
TOKENIZER_RAISES, DETOKENIZER_RAISES, NO_MEMORY = "tokenizer raises", "detokenizer raises", "no memory"
REFUSE, SWAP_RAISES, CLOCK_JUMPS = "refuse every ", "swap raises", "clock jumps"
SUBMIT_RAISES, METRICS_RAISE = "submit raises", "metrics raise"
