"""OpenAI's Responses and Conversations: items in, items out, streamed as typed events, kept where there is a store."""
