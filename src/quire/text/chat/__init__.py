"""Conversations: messages checked, templates rendered, special tokens in messages kept as text."""
