"""What people write: `fields` (options as fields of a dataclass), `parsing`, `config` (all options of the loss) and
`advice` (settings that do nothing).
"""
