"""The demo model's tokenizer: one token a character."""

from string import ascii_letters, digits, punctuation

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
CHARACTERS = "\n " + digits + ascii_letters + punctuation
"""The tasks use few of them; the others let any English prompt in. What is outside becomes `<unk>`."""

# The model has no memory of a conversation: the last user message is the whole prompt. In a chat the template
# adds the equals sign, because people do not end a request with one.
CHAT_TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list -%}"
    "{%- if not asked -%}{{ raise_exception('there is no user message') }}{%- endif -%}"
    "{%- if asked[-1] is not string -%}{{ raise_exception('the user message is not plain text') }}{%- endif -%}"
    "{%- set prompt = asked[-1] | trim -%}"
    "{{ bos_token + prompt + ('' if prompt.endswith('=') else ' =') }}"
)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer that begins every prompt with `<s>`; `max_length` is the model's context in tokens."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
