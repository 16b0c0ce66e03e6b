"""peft's config; attach, save and reload an adapter; inits; transfer."""
