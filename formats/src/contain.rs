//! Decoders kept from taking the process down: a panic inside one becomes an error that names the file.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::error::ReadError;

/// Runs `decode`, which must leave nothing half-changed behind that outlives a panic.
pub(crate) fn contain<T>(path: &Path, decode: impl FnOnce() -> Result<T, ReadError>) -> Result<T, ReadError> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|payload| {
        Err(ReadError::Panicked { path: path.to_owned(), what: message(payload.as_ref()) })
    })
}

fn message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "no message".to_owned())
}
