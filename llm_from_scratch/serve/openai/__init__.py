"""OpenAI's protocol, the server's side: https://platform.openai.com/docs/api-reference."""
