//! One error type for everything a user can cause: what failed, why, and a hint.

use std::fmt;

/// Exit status for a bad command line.
pub const EXIT_USAGE: i32 = 2;
/// Exit status for a missing privilege or device.
pub const EXIT_DEVICE: i32 = 4;
/// Exit status for every other failure.
pub const EXIT_FAILURE: i32 = 1;

/// A failure that ends the process, shown as one line: `what: why (hint: ...)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineError {
    pub exit: i32,
    pub what: String,
    pub why: String,
    pub hint: String,
}

pub type Result<T> = std::result::Result<T, EngineError>;

impl EngineError {
    pub fn new(exit: i32, what: impl Into<String>, why: impl fmt::Display, hint: impl Into<String>) -> Self {
        Self { exit, what: what.into(), why: why.to_string(), hint: hint.into() }
    }

    pub fn usage(what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::new(EXIT_USAGE, what, why, "see retinue-engine --help")
    }

    pub fn device(what: impl Into<String>, why: impl fmt::Display, hint: impl Into<String>) -> Self {
        Self::new(EXIT_DEVICE, what, why, hint)
    }

    pub fn failure(what: impl Into<String>, why: impl fmt::Display, hint: impl Into<String>) -> Self {
        Self::new(EXIT_FAILURE, what, why, hint)
    }
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)?;
        if !self.hint.is_empty() {
            write!(f, " (hint: {})", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for EngineError {}
