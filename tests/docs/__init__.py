"""The documents are run: blocks, commands, links, and that nothing public is missing from its page."""
