"""The one table of tolerances: largest absolute difference unless a name says otherwise."""

FLOAT64_GRADIENT_RELATIVE = 1e-12
"""Two ways to cut the same step, float64."""
FLOAT64_ENGINES_RELATIVE = 1e-12
"""Weights and norms after a few steps on several processes against one, float64, relative to the largest."""
FLOAT32_ENGINES_RELATIVE = 1e-6
"""The same in float32, for engines that know no float64."""
FLOAT64_SENT_TOTAL = 1e-12
"""What fifty compressed steps sent and still owe against what they were given, float64, relative to the largest."""
FLOAT32_SUM_RELATIVE = 1e-5
"""Sums over ranks that went through factors of full rank, float32, relative to the largest."""
FLOAT64_RUN = 1e-9
"""Losses and gradient norms of whole runs that differ only in the cut, float64."""
FLOAT64_LOGITS = 1e-10
"""Against another implementation of the same model, float64."""
FLOAT32_LOSS = 1e-6
FLOAT32_GRADIENT = 1e-5
FLOAT32_HIDDEN = 1e-5
BFLOAT16_RELATIVE = 2e-2
HALF_RELATIVE = 2e-2
"""Kernels that multiply bfloat16 or float16, against the definition in float32: norm of the difference."""
RATE_RELATIVE = 1e-12
"""Learning rates against hand arithmetic."""
LOGGED_RATE_RELATIVE = 1e-6
"""Learning rates against a log that printed seven digits."""
ADAMW_WEIGHT = 1e-7
"""Our AdamW against torch's after a few steps, float32."""
EIGHT_BIT_DRIFT = 0.02
"""AdamW with means in eight bits against AdamW: distance after 100 steps as a share of the way."""
FLOAT64_NATS = 1e-9
"""Surprise per token against the same policy worked out in numpy, float64."""
MUON_SINGULAR_VALUES = (0.5, 1.3)
"""Range of singular values after five quintic steps in bfloat16; exact orthogonality would be 1."""
MUON_UPDATE_RELATIVE = 5e-2
"""Two bfloat16 orthogonalisations that round their norm differently, relative to an update's size."""
SCALED_GRADIENT_RELATIVE = 1e-7
"""Dividing by the count before or after backward, float32: relative to the largest element."""
CLIPPED_NORM_RELATIVE = 1e-6
"""Norm of float32 gradients after clipping, relative to the limit."""
FLOAT64_PROBABILITY = 1e-12
"""What is drawn from, against the definition worked out number by number, float64."""
FLOAT32_FREQUENCY_RELATIVE = 1e-5
"""Rotary frequencies against a library that works them out in float32."""
TRANSFORMERS_FLOAT64_LOGITS = 1e-6
"""Against transformers' own classes as they are: beside float64 weights they keep float32 angles and norms."""
SFT_GRADIENT_RELATIVE = 1e-10
"""Gradients of packed rows against transformers' on padded ones, float64, relative to each tensor's largest."""
TRANSFORMERS_FLOAT32_LOSS = 1e-6
"""transformers' own loss takes logits in float32, whatever they are."""
PEFT_FLOAT64 = 1e-10
"""Logits with adapters against PEFT's, float64 (saved adapters are the same numbers on both sides)."""
PEFT_GRADIENT_RELATIVE = 1e-10
MERGED_LOGITS = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 3e-2}
"""Merged weights, stored and read back, against the adapter beside its model in float32, relative to the largest."""
FOREIGN_FLOAT64 = {
    "gpt2": 1e-10, "gpt_neox": 1e-5, "gemma2": 1e-5, "qwen2_moe": 1e-4, "phi": 1e-5, "gpt_oss": 1e-4, "mistral": 1e-4,
    "opt": 1e-5,
}
"""Logits in transformers' classes by our attention against the same classes by theirs, which takes float32 softmaxes,
angles and norms whatever the weights are."""
FINITE_DIFFERENCE_RELATIVE = 1e-5
"""The slope of a loss along a direction of all weights, by two evaluations, float64."""
SHARED_PROMPT_FLOAT32 = 1e-5
"""An answer beside another behind one prompt, against a row of its own, float32: relative to the number."""

FLOAT64_TWO_WAYS = {"rtol": 1e-9, "atol": 1e-12}
"""The same float64 numbers by two arrangements of the same rows: token by token and at once, shared and apart."""
TRL_FLOAT32_LOSS = 1e-7
"""Against what TRL works out in float32 whatever it is given."""
FOLLOWED_WEIGHT = 1e-6
"""Weights of a reference that follows its policy, against the formula, float32."""
FLOAT64_INVARIANT = 1e-10
"""Losses, norms and Terms of three steps under another arrangement, float64: relative to the larger of 1 and them."""
