"""OpenAI's files and batches: requests in a file, answered beside other traffic, and again after a restart."""
