"""The REST endpoints and their OpenAPI description."""
