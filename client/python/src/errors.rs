//! The Rust client's errors as the package's exceptions (`robocache/_errors.py`).

use std::error::Error;
use std::fmt::Write;

use pyo3::PyErr;
use pyo3::exceptions::{PyKeyError, PyValueError};
use robocache::{ColumnError, ConnectError, GpuError, LoaderError, RefusalCode};

mod python {
    use pyo3::import_exception;

    import_exception!(robocache._errors, RoboCacheError);
    import_exception!(robocache._errors, RequestError);
    import_exception!(robocache._errors, DeviceError);
    import_exception!(robocache._errors, DeviceRefused);
    import_exception!(robocache._errors, DatasetError);
    import_exception!(robocache._errors, DaemonNotFound);
    import_exception!(robocache._errors, DaemonGone);
    import_exception!(robocache._errors, AllSlotsHeld);
    import_exception!(robocache._errors, ProtocolError);
    import_exception!(robocache._errors, LoaderClosed);
    import_exception!(robocache._errors, StateError);
}

pub(crate) use python::*;

/// An error with its causes on one line: Python shows no Rust chain.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        // Writing to a String cannot fail.
        if write!(text, ": {source}").is_err() {
            break;
        }
        next = source.source();
    }
    text
}

/// Why no loader could be made.
pub(crate) fn of_connect(error: &ConnectError) -> PyErr {
    let text = chain(error);
    match error {
        ConnectError::Argument { .. } => RequestError::new_err(text),
        ConnectError::Refused { code, .. } => of_refusal(*code, text),
        ConnectError::Gpu(error) => of_gpu(error),
        ConnectError::NoDaemon { .. }
        | ConnectError::NotTrusted { .. }
        | ConnectError::NotAllowed { .. }
        | ConnectError::Embedded(_) => DaemonNotFound::new_err(text),
        ConnectError::HungUp { .. } | ConnectError::TimedOut { .. } => DaemonGone::new_err(text),
        ConnectError::Protocol { .. } | ConnectError::Socket(_) | ConnectError::Segment(_) => {
            ProtocolError::new_err(text)
        }
        _ => RoboCacheError::new_err(text),
    }
}

/// Why an iteration cannot go on.
pub(crate) fn of_loader(error: &LoaderError) -> PyErr {
    let text = chain(error);
    match error {
        LoaderError::DaemonGone { .. } | LoaderError::Draining { .. } => DaemonGone::new_err(text),
        LoaderError::Failed { .. } => DatasetError::new_err(text),
        LoaderError::AllSlotsHeld { .. } => AllSlotsHeld::new_err(text),
        LoaderError::Position { .. } => StateError::new_err(text),
        LoaderError::Refused { code, .. } => of_refusal(*code, text),
        LoaderError::Protocol { .. } | LoaderError::Socket(_) => ProtocolError::new_err(text),
        _ => RoboCacheError::new_err(text),
    }
}

/// Why a device, or a batch on one, cannot be used.
pub(crate) fn of_gpu(error: &GpuError) -> PyErr {
    DeviceError::new_err(chain(error))
}

/// Why a column cannot be had.
#[expect(clippy::needless_pass_by_value, reason = "the shape map_err wants")]
pub(crate) fn of_column(error: ColumnError) -> PyErr {
    match error {
        ColumnError::Missing { .. } => PyKeyError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

fn of_refusal(code: RefusalCode, text: String) -> PyErr {
    match code {
        RefusalCode::BadRequest => RequestError::new_err(text),
        RefusalCode::UnsupportedDevice => DeviceRefused::new_err(text),
        RefusalCode::NotFound | RefusalCode::Dataset => DatasetError::new_err(text),
        _ => RoboCacheError::new_err(text),
    }
}
