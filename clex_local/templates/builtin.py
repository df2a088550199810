"""Our own chat templates, for models that have none."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The text so far, continued: for models that were never taught to chat.
PLAIN = (
    "{% for message in messages %}{% if message.role == 'user' and not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message.content }}{% endfor %}"
)
