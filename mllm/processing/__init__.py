"""How do samples become model inputs? Images, chat, token layout, processor."""
