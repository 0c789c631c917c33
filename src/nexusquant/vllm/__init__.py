"""A KV connector for vLLM: compressed blocks in a store that several servers share."""
