"""Chat templates by name, for checkpoints that bring none of their own.

Each is the format that a family of models was trained with, as Jinja.
"""

from __future__ import annotations

_SYSTEM_FIRST = """\
{%- if messages and messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}{%- set rest = messages -%}
{%- endif -%}
"""

TEMPLATES: dict[str, str] = {
    # Qwen, InternLM2 and many others
    "chatml": (
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    "llama2": _SYSTEM_FIRST
    + (
        "{%- for message in rest -%}"
        "{%- if message.role == 'user' -%}"
        "{%- set text = ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '')"
        " + message.content -%}"
        "{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}"
        "{%- else -%}"
        "{{ ' ' + message.content | trim + ' ' + eos_token }}"
        "{%- endif -%}"
        "{%- endfor -%}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{%- for message in messages -%}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim"
        " + '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{%- endif -%}"
    ),
    "mistral": _SYSTEM_FIRST
    + (
        "{{ bos_token }}"
        "{%- for message in rest -%}"
        "{%- if message.role == 'user' -%}"
        "{%- set text = (system + '\\n\\n' if loop.first and system else '') + message.content -%}"
        "{{ '[INST] ' + text + ' [/INST]' }}"
        "{%- else -%}"
        "{{ ' ' + message.content | trim + eos_token }}"
        "{%- endif -%}"
        "{%- endfor -%}"
    ),
    "gemma": _SYSTEM_FIRST
    + (
        "{{ bos_token }}"
        "{%- for message in rest -%}"
        "{%- set role = 'model' if message.role == 'assistant' else message.role -%}"
        "{{ '<start_of_turn>' + role + '\\n' + (system + '\\n\\n' if loop.first and system else '')"
        " + message.content | trim + '<end_of_turn>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    ),
    "phi3": (
        "{%- for message in messages -%}"
        "{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
    ),
    # Behind the last tag the model may name a tool before its answer begins on a new line
    "chatglm3": (
        "[gMASK]sop"
        "{%- for message in messages -%}"
        "{%- set role = 'observation' if message.role == 'tool' else message.role -%}"
        "{{ '<|' + role + '|>\\n ' + message.content }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
    ),
    "zephyr": (
        "{%- for message in messages -%}"
        "{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
    ),
    "vicuna": _SYSTEM_FIRST
    + (
        "{{ bos_token }}{{ system + ' ' if system else '' }}"
        "{%- for message in rest -%}"
        "{%- if message.role == 'user' -%}"
        "{{ 'USER: ' + message.content + ' ' }}"
        "{%- else -%}"
        "{{ 'ASSISTANT: ' + message.content + eos_token }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    ),
    # Stanford Alpaca's, for base models without tokens of their own for turns
    "alpaca": _SYSTEM_FIRST
    + (
        "{{ bos_token }}{{ system + '\\n\\n' if system else '' }}"
        "{%- for message in rest -%}"
        "{%- if message.role == 'user' -%}"
        "{{ '### Instruction:\\n' + message.content + '\\n\\n' }}"
        "{%- else -%}"
        "{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
    ),
    # Nothing but the words: the prompt, then the answer
    "plain": (
        "{{ bos_token }}"
        "{%- for message in messages -%}"
        "{{ message.content + (eos_token if message.role == 'assistant' else '') }}"
        "{%- endfor -%}"
    ),
}
