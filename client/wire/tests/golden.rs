//! The bytes of the wire, as literals: every kind of message, the control header and the batch header.
//!
//! A change here is a change of the protocol: it needs another version number, and old clients must be told.
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]

use robocache_types::{DType, Interp};
use robocache_wire::batch::BatchHeader;
use robocache_wire::message::{DecodeError, Message, RefusalCode, ToClient, ToDaemon};
use robocache_wire::segment::Shape;
use robocache_wire::spec::{
    AnchorSpec, ColumnInfo, ColumnRole, DatasetRef, GpuKind, GpuRing, IpcHandle, LoaderInfo, LoaderSpec,
    OffsetsSpec, Place, Position, TextTableInfo, WindowSpec,
};

fn check<M: Message + PartialEq + std::fmt::Debug>(message: M, header: &[u8; 16], body: &str) {
    let wanted = [header.as_slice(), body.as_bytes()].concat();
    let found = message.encode().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&found[16..]),
        body,
        "body of {message:?}; header {:02x?}",
        &found[..16]
    );
    assert_eq!(found, wanted);
    assert_eq!(M::decode(&wanted).unwrap(), message);
}

fn spec() -> LoaderSpec {
    LoaderSpec {
        dataset: DatasetRef::Path("/data/g1".into()),
        manifest: None,
        batch_size: 64,
        windows: Some(vec![
            (
                "action".to_owned(),
                WindowSpec {
                    offsets: OffsetsSpec::Grid { hz: 50.0, steps: 50, start: -1.0 / 30.0 },
                    interp: Some(Interp::Linear),
                    max_gap: None,
                },
            ),
            (
                "gripper".to_owned(),
                WindowSpec { offsets: OffsetsSpec::At(vec![0.0, 0.1]), interp: None, max_gap: Some(0.5) },
            ),
        ]),
        delta_timestamps: None,
        features: Some(vec!["task".to_owned()]),
        anchors: AnchorSpec::Every { hz: 10.0 },
        anchor_stream: None,
        dtype: DType::BFloat16,
        dtypes: vec![("gripper".to_owned(), DType::Float64)],
        device: "cpu".to_owned(),
        shuffle: true,
        seed: u64::MAX,
        drop_last: false,
        episodes: Some(vec![0, -1]),
        rank: 1,
        world_size: 8,
        slots: 4,
        start: Position { epoch: 3, consumed: 512 },
    }
}

#[test]
fn open() {
    check(
        ToDaemon::Open(Box::new(spec())),
        b"RC01\x01\x00\x01\x00\x3d\x02\x00\x00\x00\x00\x00\x00",
        concat!(
            r#"{"dataset":{"path":"/data/g1"},"manifest":null,"batch_size":64,"windows":[["action","#,
            r#"{"offsets":{"grid":{"hz":50.0,"steps":50,"start":-0.03333333333333333}},"interp":"linear","max_gap":null}],"#,
            r#"["gripper",{"offsets":{"at":[0.0,0.1]},"interp":null,"max_gap":0.5}]],"delta_timestamps":null,"#,
            r#""features":["task"],"anchors":{"every":{"hz":10.0}},"anchor_stream":null,"dtype":"bfloat16","#,
            r#""dtypes":[["gripper","float64"]],"device":"cpu","shuffle":true,"seed":18446744073709551615,"#,
            r#""drop_last":false,"episodes":[0,-1],"rank":1,"world_size":8,"slots":4,"start":{"epoch":3,"consumed":512}}"#,
        ),
    );
}

#[test]
fn seek() {
    check(
        ToDaemon::Seek { run: 7, position: Position { epoch: 1, consumed: 2 } },
        b"RC01\x01\x00\x02\x00\x2d\x00\x00\x00\x00\x00\x00\x00",
        r#"{"run":7,"position":{"epoch":1,"consumed":2}}"#,
    );
}

#[test]
fn status_stop_and_bye() {
    check(ToDaemon::Status, b"RC01\x01\x00\x03\x00\x02\x00\x00\x00\x00\x00\x00\x00", "{}");
    check(
        ToDaemon::Stop { now: true },
        b"RC01\x01\x00\x04\x00\x0c\x00\x00\x00\x00\x00\x00\x00",
        r#"{"now":true}"#,
    );
    check(ToDaemon::Bye, b"RC01\x01\x00\x05\x00\x02\x00\x00\x00\x00\x00\x00\x00", "{}");
    check(
        ToDaemon::Attached { done: vec![IpcHandle([0xa5; 64])] },
        b"RC01\x01\x00\x06\x00\x8d\x00\x00\x00\x00\x00\x00\x00",
        &format!(r#"{{"done":["{}"]}}"#, "a5".repeat(64)),
    );
}

#[test]
fn opened() {
    let info = LoaderInfo {
        client: 5,
        daemon_pid: 77,
        fingerprint: "c0ffee".to_owned(),
        anchors: 35_965,
        batch_size: 64,
        rank: 0,
        world_size: 1,
        drop_last: true,
        slots: 4,
        slot_bytes: 8192,
        columns: vec![
            ColumnInfo {
                name: "action".to_owned(),
                dtype: DType::Float32,
                shape: vec![2, 3],
                offset: 576,
                role: ColumnRole::Data,
                place: Place::Host,
            },
            ColumnInfo {
                name: "task".to_owned(),
                dtype: DType::Int32,
                shape: vec![],
                offset: 2112,
                role: ColumnRole::Text { table: 0 },
                place: Place::Host,
            },
        ],
        text_tables: vec![TextTableInfo { offset: 0, len: 12, count: 1 }],
        warnings: vec!["no videos".to_owned()],
        gpu: None,
    };
    check(
        ToClient::Opened(Box::new(info)),
        b"RC01\x01\x00\x41\x00\x8f\x01\x00\x00\x00\x00\x00\x00",
        concat!(
            r#"{"client":5,"daemon_pid":77,"fingerprint":"c0ffee","anchors":35965,"batch_size":64,"rank":0,"world_size":1,"#,
            r#""drop_last":true,"slots":4,"slot_bytes":8192,"columns":[{"name":"action","dtype":"float32","shape":[2,3],"#,
            r#""offset":576,"role":"data"},{"name":"task","dtype":"int32","shape":[],"offset":2112,"#,
            r#""role":{"text":{"table":0}}}],"text_tables":[{"offset":0,"len":12,"count":1}],"warnings":["no videos"]}"#,
        ),
    );
}

#[test]
fn opened_on_a_gpu() {
    let info = LoaderInfo {
        client: 5,
        daemon_pid: 77,
        fingerprint: "c0ffee".to_owned(),
        anchors: 1,
        batch_size: 1,
        rank: 0,
        world_size: 1,
        drop_last: false,
        slots: 2,
        slot_bytes: 4096,
        columns: vec![ColumnInfo {
            name: "action".to_owned(),
            dtype: DType::BFloat16,
            shape: vec![7],
            offset: 0,
            role: ColumnRole::Data,
            place: Place::Device,
        }],
        text_tables: vec![],
        warnings: vec![],
        gpu: Some(GpuRing {
            kind: GpuKind::Cuda,
            uuid: "GPU-1".to_owned(),
            name: "N".to_owned(),
            slot_bytes: 256,
            bytes: 2_097_152,
            memory: IpcHandle([1; 64]),
            ready: vec![IpcHandle([2; 64]), IpcHandle([3; 64])],
        }),
    };
    let handle = |byte: &str| byte.repeat(64);
    check(
        ToClient::Opened(Box::new(info)),
        b"RC01\x01\x00\x41\x00\x07\x03\x00\x00\x00\x00\x00\x00",
        &[
            r#"{"client":5,"daemon_pid":77,"fingerprint":"c0ffee","anchors":1,"batch_size":1,"rank":0,"world_size":1,"#,
            r#""drop_last":false,"slots":2,"slot_bytes":4096,"columns":[{"name":"action","dtype":"bfloat16","shape":[7],"#,
            r#""offset":0,"role":"data","place":"device"}],"text_tables":[],"warnings":[],"gpu":{"kind":"cuda","#,
            r#""uuid":"GPU-1","name":"N","slot_bytes":256,"bytes":2097152,"memory":""#,
            &handle("01"),
            r#"","ready":[""#,
            &handle("02"),
            r#"",""#,
            &handle("03"),
            r#""]}}"#,
        ]
        .concat(),
    );
}

#[test]
fn a_handle_that_is_no_64_bytes_in_hex_is_refused() {
    for wrong in ["", "00", &"g0".repeat(64), &"00".repeat(65), &"é".repeat(64)] {
        serde_json::from_value::<IpcHandle>(wrong.into()).unwrap_err();
    }
    let handle: IpcHandle = serde_json::from_value("0f".repeat(64).into()).unwrap();
    assert_eq!(handle, IpcHandle([15; 64]));
}

#[test]
fn refused_failed_draining_status_and_stopping() {
    check(
        ToClient::Refused { code: RefusalCode::UnsupportedDevice, message: "no \"cuda\"".to_owned() },
        b"RC01\x01\x00\x42\x00\x35\x00\x00\x00\x00\x00\x00\x00",
        r#"{"code":"unsupported_device","message":"no \"cuda\""}"#,
    );
    check(
        ToClient::Failed { run: 1, seq: 2, message: "x".to_owned() },
        b"RC01\x01\x00\x43\x00\x1f\x00\x00\x00\x00\x00\x00\x00",
        r#"{"run":1,"seq":2,"message":"x"}"#,
    );
    check(
        ToClient::Draining { reason: "SIGTERM".to_owned() },
        b"RC01\x01\x00\x44\x00\x14\x00\x00\x00\x00\x00\x00\x00",
        r#"{"reason":"SIGTERM"}"#,
    );
    check(
        ToClient::StatusReply(serde_json::json!({"b": [1, 2.5], "a": null})),
        b"RC01\x01\x00\x45\x00\x16\x00\x00\x00\x00\x00\x00\x00",
        r#"{"b":[1,2.5],"a":null}"#,
    );
    check(
        ToClient::Stopping { pid: 9 },
        b"RC01\x01\x00\x46\x00\x09\x00\x00\x00\x00\x00\x00\x00",
        r#"{"pid":9}"#,
    );
}

#[test]
fn every_refusal_code_has_its_documented_name() {
    for (code, name) in [
        (RefusalCode::BadRequest, "bad_request"),
        (RefusalCode::NotFound, "not_found"),
        (RefusalCode::NotAllowed, "not_allowed"),
        (RefusalCode::Dataset, "dataset"),
        (RefusalCode::UnsupportedDevice, "unsupported_device"),
        (RefusalCode::Busy, "busy"),
        (RefusalCode::Internal, "internal"),
    ] {
        assert_eq!(code.name(), name);
        assert_eq!(serde_json::to_value(code).unwrap(), name);
    }
}

#[test]
fn a_spec_may_leave_out_what_has_a_default() {
    let body = r#"{"dataset":{"name":"g1"},"batch_size":2,"slots":2}"#;
    let bytes = [b"RC01\x01\x00\x01\x00\x32\x00\x00\x00\x00\x00\x00\x00", body.as_bytes()].concat();
    let ToDaemon::Open(spec) = ToDaemon::decode(&bytes).unwrap() else { panic!("kind 1 is Open") };
    assert_eq!((spec.world_size, spec.dtype, spec.device.as_str()), (1, DType::Float32, "cpu"));
    assert_eq!(spec.start, Position::default());
}

#[test]
fn another_version_is_told_by_name_with_what_to_upgrade() {
    let bytes = *b"RC01\x09\x00\x03\x00\x02\x00\x00\x00\x00\x00\x00\x00{}";
    let error = ToDaemon::decode(&bytes).unwrap_err();
    assert!(matches!(error, DecodeError::Version { found: 9 }), "{error}");
    let text = error.to_string();
    assert!(text.contains("version 9") && text.contains("version 1: upgrade this program"), "{text}");
    let older = *b"RC01\x00\x00\x03\x00\x02\x00\x00\x00\x00\x00\x00\x00{}";
    let text = ToDaemon::decode(&older).unwrap_err().to_string();
    assert!(text.contains("upgrade the peer"), "{text}");
}

#[test]
fn each_broken_header_is_its_own_error() {
    let ok = *b"RC01\x01\x00\x03\x00\x02\x00\x00\x00\x00\x00\x00\x00{}";
    assert_eq!(ToDaemon::decode(&ok).unwrap(), ToDaemon::Status);
    let with = |at: usize, byte: u8| {
        let mut bytes = ok;
        bytes[at] = byte;
        ToDaemon::decode(&bytes).unwrap_err()
    };
    assert!(matches!(ToDaemon::decode(&ok[..15]), Err(DecodeError::Short { found: 15 })));
    assert!(matches!(with(0, b'X'), DecodeError::Magic { .. }));
    assert!(matches!(with(6, 65), DecodeError::Kind { kind: 65 }));
    assert!(matches!(with(8, 3), DecodeError::Length { said: 3, found: 2 }));
    assert!(matches!(with(12, 1), DecodeError::Reserved { found: 1 }));
    assert!(matches!(with(17, b','), DecodeError::Json { kind: "Status", .. }));
    let mut unknown = ToDaemon::Stop { now: true }.encode().unwrap();
    let at = unknown.iter().position(|byte| *byte == b'w').unwrap();
    unknown[at] = b't';
    assert!(matches!(ToDaemon::decode(&unknown), Err(DecodeError::Json { kind: "Stop", .. })));
}

#[test]
fn an_over_long_message_says_what_is_too_long() {
    let mut spec = spec();
    spec.manifest = Some("x".repeat(200_000));
    let error = ToDaemon::Open(Box::new(spec)).encode().unwrap_err().to_string();
    assert!(error.contains("\"manifest\" with 200002 bytes") && error.contains("131072"), "{error}");
}

#[test]
fn not_a_number_is_refused_before_json_would_make_it_null() {
    let mut spec = spec();
    spec.windows.as_mut().unwrap()[1].1.max_gap = Some(f64::NAN);
    let error = ToDaemon::Open(Box::new(spec)).encode().unwrap_err().to_string();
    assert!(error.contains("window \"gripper\": max_gap"), "{error}");
}

#[test]
fn the_control_header() {
    let shape = Shape { slots: 4, slot_bytes: 8192, batch_size: 64, client: 5, daemon_pid: 77 };
    let bytes: [u8; 68] = [
        b'R', b'O', b'B', b'O', b'C', b'A', b'C', b'H', // magic
        1, 0, 0, 0, // version
        0, 0x10, 0, 0, // header bytes
        4, 0, 0, 0, // slots
        5, 0, 0, 0, // client
        0, 0x20, 0, 0, 0, 0, 0, 0, // slot bytes
        0, 0x20, 0, 0, 0, 0, 0, 0, // control bytes: 4096 + 4 * 64, in pages
        0, 0x80, 0, 0, 0, 0, 0, 0, // data bytes
        0, 0x10, 0, 0, 0, 0, 0, 0, // lines offset
        64, 0, 0, 0, // line bytes
        64, 0, 0, 0, // batch size
        77, 0, 0, 0, // daemon pid
    ];
    assert_eq!(shape.encode_header().unwrap(), bytes);
    assert_eq!(Shape::decode_header(&bytes).unwrap(), shape);
    // Each byte counts: a header that differs in one is refused or says something else.
    for at in 0..bytes.len() {
        let mut other = bytes;
        other[at] ^= 0x81;
        assert!(Shape::decode_header(&other).map_or(true, |found| found != shape), "byte {at}");
    }
}

#[test]
fn the_batch_header() {
    let header = BatchHeader {
        seq: 0x0102,
        epoch: 3,
        batch: 0x0405,
        rows: 6,
        last_of_epoch: true,
        run: 7,
        consumed_before: 0x0809,
        assemble_ns: 0x0a0b_0c0d,
    };
    let bytes: [u8; 64] = [
        2, 1, 0, 0, 0, 0, 0, 0, // seq
        3, 0, 0, 0, 0, 0, 0, 0, // epoch
        5, 4, 0, 0, 0, 0, 0, 0, // batch
        6, 0, 0, 0, // rows
        1, 0, 0, 0, // flags
        7, 0, 0, 0, // run
        0, 0, 0, 0, // zero
        9, 8, 0, 0, 0, 0, 0, 0, // consumed before
        13, 12, 11, 10, 0, 0, 0, 0, // assemble ns
        64, 0, 0, 0, 0, 0, 0, 0, // ids offset
    ];
    assert_eq!(header.encode(), bytes);
    assert_eq!(BatchHeader::decode(&bytes, 64).unwrap(), header);
}
