"""What happens to a request before and after the engine: admission, routes, counts, the client."""
