"""From prompts to outputs: everything above the core that knows text."""
