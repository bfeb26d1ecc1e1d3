"""A model that talks: chat prompts of English, and answers that end where the model ends them."""

from bench.chat_prompts import chat_prompts
from bench.workload import Workload

WORKLOAD = Workload(
    "W5",
    "SmolLM2-135M-Instruct, 200 chat prompts of 30…300, at most 64 tokens each",
    "smollm2",
    lambda lengths: [(lengths.randint(30, 300), 64) for _ in range(200)],
    stops_at_eos=True,
    prompts=chat_prompts,
)
