"""What our server adds to vLLM's, in the API process."""
