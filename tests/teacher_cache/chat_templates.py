"""Chat templates in the styles of model families that think and call tools, and templates that do not do."""

CHATML_THINKING = """\
{%- set tail = namespace(first=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set tail.first = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
    {{- '<|im_start|>system\\nTools:' -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- elif message.role != 'assistant' -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- else -%}
        {%- set content = message.content -%}
        {%- set thinking = message.reasoning_content or '' -%}
        {%- if '</think>' in content -%}
            {%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > tail.first and (loop.last or thinking) -%}
            {{- '<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- content -}}
        {%- for call in message.tool_calls or [] -%}
            {%- if content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As Qwen3: thinking only behind the last question, tool results in turns of the user."""

HEADERS = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' and message.tool_calls -%}
        {%- if message.tool_calls | length != 1 -%}{{- raise_exception('one tool call at a time') -}}{%- endif -%}
        {%- set call = message.tool_calls[0].function -%}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|im_end|>' -}}
    {%- else -%}
        {%- set role = 'ipython' if message.role == 'tool' else message.role -%}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|im_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
"""As Llama 3: a tool call instead of a text, results from `ipython`, thinking is text like any other."""

OPEN_THINKING = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|assistant|>' + message.content.split('</think>')[-1] + '<|im_end|>' -}}
    {%- else -%}{{- '<|user|>' + message.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}
"""
"""As DeepSeek-R1: the header of a new answer opens the thinking, the history has none."""

PLAIN = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""As ChatML was at first: knows neither thinking nor tools."""

HEADERLESS = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}{{- ' ' + message.content + '<|im_end|>' -}}
    {%- else -%}{{- '[INST] ' + message.content + ' [/INST]' -}}{%- endif -%}
{%- endfor -%}
"""
"""As Llama 2: an answer begins where the question ends."""

UNFIT = {
    "drops all but the last answer": PLAIN.replace(
        "{{- '<|im_start|>'", "{%- if message.role == 'user' or loop.last -%}{{- '<|im_start|>'"
    ).replace("'<|im_end|>\\n' -}}\n{%- endfor", "'<|im_end|>\\n' -}}{%- endif -%}\n{%- endfor"),
    "changes answers": PLAIN.replace("message.content", "(message.content | upper)"),
    "renders answers twice": PLAIN.replace("message.content", "message.content + message.content"),
    "looks at how answers begin": PLAIN.replace(
        "message.content", "('short' if message.content.startswith('s') else message.content)"
    ),
    "refuses a second question": PLAIN.replace(
        "{{- '<|im_start|>'",
        "{%- if loop.index0 > 1 -%}{{- raise_exception('one turn') -}}{%- endif -%}{{- '<|im_start|>'",
    ),
    "expects another kind of content": PLAIN.replace("message.content", "message.content[0]['text']"),
}
