// Read every column of a Parquet file with a JavaScript library, and print what it says as JSON, as read_with.py does.
//
//     node read_with.mjs hyparquet FILE        (with hyparquet and hyparquet-compressors in node_modules)

import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { pathToFileURL } from 'node:url'

const [reader, file] = process.argv.slice(2)
// Modules are those of the folder it is run in, not of the folder it lies in.
const find = createRequire(path.join(process.cwd(), 'package.json'))
const load = (name) => import(pathToFileURL(find.resolve(name)))
const folder = (name) => path.join(process.cwd(), 'node_modules', name)
const version = JSON.parse(fs.readFileSync(path.join(folder(reader), 'package.json'))).version

function plain(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return null
  if (typeof value === 'bigint') return Number(value)
  if (typeof value !== 'object') return value
  return Array.from(value, plain)
}

async function read(name) {
  const { parquetRead } = await load(reader)
  const { compressors } = await load('hyparquet-compressors')
  const bytes = fs.readFileSync(file)
  const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)
  return new Promise((resolve, reject) => {
    const onComplete = (rows) => resolve(rows.map((row) => (Array.isArray(row) ? row[0] : row[name])))
    const done = parquetRead({ file: buffer, compressors, columns: [name], rowFormat: 'array', utf8: false, onComplete })
    done.catch(reject)
  })
}

const names = 'key image_digest height width target box_top box_left box_height box_width flip class_index class_prob ' +
  'target_prob bucket'
const columns = {}
for (const name of names.split(' ')) {
  try {
    const values = await read(name)
    const hex = (bytes) => Buffer.from(bytes).toString('hex')
    columns[name] = name === 'image_digest' ? values.map(hex) : values.map(plain)
  } catch (error) {
    columns[name] = { error: String(error.message).slice(0, 200) }
  }
}
console.log(JSON.stringify({ version, columns }))
