"""The authorization server on Authlib, and the one verifier of its tokens. Knows who asks; decides nothing that they may do."""
