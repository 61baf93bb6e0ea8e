"""Text: sources, chats, needles, and the documents that are made of them."""
