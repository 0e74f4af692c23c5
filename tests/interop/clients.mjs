// Asks a server through the Vercel AI SDK and prints what it got, as JSON: node clients.mjs URL
// Node finds the packages beside this file, so test_clients.py runs a copy of it in their folder.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { embed, generateObject, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from 'ai'

const provider = createOpenAICompatible({
  name: 'minimind', baseURL: process.argv[2], apiKey: 'none', includeUsage: true, supportsStructuredOutputs: true
})
const model = provider('tiny')
const common = { model, maxOutputTokens: 64, temperature: 0, maxRetries: 0 }
const place = jsonSchema({ type: 'object', properties: { city: { type: 'string' } }, required: ['city'] })
const short = jsonSchema({
  type: 'object', properties: { city: { type: 'string', maxLength: 12 } }, required: ['city'], additionalProperties: false
})
const tools = {
  weather: tool({
    description: 'Weather in a city', inputSchema: place, execute: async ({ city }) => `20 degrees in ${city}`
  })
}
const brief = { ...common, system: 'Be brief.', prompt: 'hi' }

const stream = streamText({ ...brief })
let streamed = ''
for await (const piece of stream.textStream) streamed += piece
const agent = await generateText({ ...common, prompt: 'go', tools, stopWhen: stepCountIs(3) })
const call = agent.steps[0].toolCalls[0]
const both = await generateText({ ...common, prompt: 'place', tools, output: Output.object({ schema: short }) })
const thought = streamText({ ...common, prompt: 'why' })
const thinking = await thought.reasoningText
let embeddings
try {
  await embed({ model: provider.textEmbeddingModel('tiny'), value: 'hi', maxRetries: 0 })
} catch (problem) {
  embeddings = problem.message
}
console.log(JSON.stringify({
  whole: (await generateText(brief)).text,
  streamed,
  usage: [(await stream.usage).totalTokens],
  thinking,
  call: [call.toolName, call.input],
  after: agent.text,
  form: (await generateObject({ ...brief, schema: short })).object,
  tools_and_form: both.output,
  embeddings
}))
